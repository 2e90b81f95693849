"""What a run needs and costs on devices that are not there: memory, speed, price, and the settings that fit."""

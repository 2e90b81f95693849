"""Needs and costs of a run on absent devices: memory, speed, price, and the settings that fit."""

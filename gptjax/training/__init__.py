"""Step, loop, losses, optimizers and metrics of every stage; step and loop know no model."""

"""What every stage trains with: step, loop, losses, optimizers, metrics. Knows no model."""

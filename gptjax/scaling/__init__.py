"""Parameter and FLOP counts, and the scaling laws built on them."""

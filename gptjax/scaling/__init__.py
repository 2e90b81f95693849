"""Parameter and FLOP counts, the scaling laws built on them, and fits of those laws to runs."""

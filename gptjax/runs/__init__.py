"""A run: its folder and settings, checkpoints with their digests, a model read back, and starts from another run."""

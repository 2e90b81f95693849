"""Training stages, one file each, read top to bottom."""

"""Checks of this machine, and the cluster it belongs to, for training."""

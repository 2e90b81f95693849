"""What a machine, and the cluster it belongs to, can do for training, and what is wrong with it."""

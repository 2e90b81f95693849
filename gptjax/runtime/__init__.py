"""The process before and beside JAX: XLA flags, malloc, versions, hardware, the compile cache."""

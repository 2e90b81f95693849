"""The process before and beside JAX: malloc, versions, hardware, the compile cache."""

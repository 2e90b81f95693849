"""Checks on this machine's devices that every mesh and setting gives the numbers of one device."""

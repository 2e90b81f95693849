"""Compiler options for programs that are compiled in a third of the time and run slower.

For tests that ask what XLA made of a program, its buffers or its text, or where compiling is nearly all of the time:
only the machine code is another one.
"""

UNOPTIMISED = {"xla_backend_optimization_level": 0}

"""What a process that computes sets for itself before jax starts: XLA's flags, and what becomes of freed memory."""

import ctypes
import os
import time

from gptjax.xla_flags import platform, set_xla_flags

STARTED = time.monotonic()  # about when the process began: the command line imports this first

# glibc's malloc.h: parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def tune_process() -> None:
    """Sets XLA's flags for the platform and, where the CPU computes, keeps freed memory for the next step.

    It belongs to the first lines of a program: flags are read when jax starts, arenas made with the first threads.
    """
    set_xla_flags()
    if platform() == "cpu":
        keep_freed_memory()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Has malloc keep large buffers that are freed; False where this C library can't.

    XLA on a CPU allocates a step's temporaries anew each time. glibc would give them back to the system, which then
    zeroes each page again when it is touched: about a quarter of the time of a training step. One arena, since each
    would keep buffers of its own.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_ARENA_MAX, 1)])

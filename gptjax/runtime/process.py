"""What a process that computes sets for itself before jax starts: XLA's flags, and what becomes of freed memory."""

import ctypes
import os
import time
from pathlib import Path

from gptjax.runtime.xla_flags import platform, set_xla_flags

STARTED = time.monotonic()  # about when the process began: the command line imports this first

# glibc's malloc.h: parameters of mallopt. Linux's mman.h: advice for madvise.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGE_ADVICE, _HUGE_PAGE = 14, 2 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tune_process() -> None:
    """Sets XLA's flags for the platform and, where the CPU computes, keeps freed memory for the next step.

    It belongs to the first lines of a program: flags are read when jax starts, arenas made with the first threads.
    """
    set_xla_flags()
    if platform() == "cpu" and keep_freed_memory():
        use_huge_pages()


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
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_ARENA_MAX, 1)])  # -1: never trimmed


def use_huge_pages() -> bool:
    """Has Linux back the heap, up to half of the machine's memory, by huge pages; False where it has none on request.

    Weights and caches are read whole in each step, and with pages of 4 KiB looking these up takes a part of the time.
    Addresses are reserved and given back to malloc, which keeps them (keep_freed_memory): memory is taken when touched.
    """
    try:
        if "[madvise]" not in HUGE_PAGES.read_text():
            return False
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        block = libc.malloc(ctypes.c_size_t(size))
    except (AttributeError, OSError, TypeError):
        return False
    if not block:
        return False
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    length = (block + size - start) // _HUGE_PAGE * _HUGE_PAGE
    failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _HUGE_PAGE_ADVICE)
    libc.free(ctypes.c_void_p(block))
    return not failed

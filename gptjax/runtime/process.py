"""Process setup before JAX starts: the platform that it will choose, and malloc tuning on a CPU."""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from gptjax.config.section import InputError

STARTED = time.monotonic()  # about when the process began: the command line imports this first

# glibc's malloc.h: parameters of mallopt. Linux's mman.h: advice for madvise.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGE_ADVICE, _HUGE_PAGE = 14, 2 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tune_process() -> None:
    """Tunes malloc where the CPU computes. Call it in the first lines of a program: threads make the arenas."""
    if expected_platform() == "cpu" and keep_freed_memory():
        use_huge_pages()


def expected_platform(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str:
    """cpu, gpu or tpu, as jax will choose it: by JAX_PLATFORMS, else by the devices of this machine; without jax."""
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(asked, "cpu")
    tpu_names = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")
    if any(environment.get(name) for name in tpu_names) or any(devices.glob("accel[0-9]*")):
        return "tpu"
    return "gpu" if any(devices.glob("nvidia[0-9]*")) or (devices / "kfd").exists() else "cpu"


def default_workers() -> int:
    """Workers, threads or processes, to start where no number is asked for: one a core."""
    return usable_cores()


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_workers(count: int) -> None:
    """Raises InputError for more training processes than usable cores, or several that would share an accelerator."""
    if count > usable_cores():
        raise InputError(f"workers={count}: wanted at most the {usable_cores()} cores that are usable here")
    if count > 1 and (kind := expected_platform()) != "cpu":
        raise InputError(
            f"workers={count}: wanted 1 where a {kind} computes, for each job takes all that it sees; with "
            "several GPUs start this command once for each, with CUDA_VISIBLE_DEVICES, or set JAX_PLATFORMS=cpu"
        )


@contextlib.contextmanager
def pinned(slot: int, slots: int) -> Iterator[None]:
    """Processes started meanwhile run on this slot's share of the cores, where the system can pin them."""
    if slots == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cores[slot * len(cores) // slots : (slot + 1) * len(cores) // slots])
        yield
    finally:
        os.sched_setaffinity(0, cores)


def keep_freed_memory() -> bool:
    """Makes malloc keep freed buffers instead of returning them to the system; False where this C library can't.

    XLA on a CPU allocates the temporaries of each step anew. glibc would return them to the system, which zeroes every
    page again at its next use: about a quarter of a training step's time. One arena, since each keeps its own buffers.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_ARENA_MAX, 1)])  # -1: never trimmed


def use_huge_pages() -> bool:
    """Backs the heap, up to half of the machine's memory, by huge pages; False where Linux has none on request.

    Every step reads all weights, and with pages of 4 KiB the address lookups take a measurable part of it. Addresses
    are reserved and freed to malloc, which keeps them (see keep_freed_memory); memory is taken at first use.
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

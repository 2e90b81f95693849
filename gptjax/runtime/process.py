"""Process setup before JAX starts: the platform that it will choose, and malloc tuning on a CPU."""

import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from gptjax.config.section import InputError

STARTED = time.monotonic()  # about when the process began: the command line imports this first

BACKGROUND = "background"  # the name of threads whose work a failed verb does not wait for

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt, from glibc's malloc.h


def tune_process() -> None:
    """Tunes malloc where the CPU computes. Call it in the first lines of a program: threads make the arenas."""
    if expected_platform() == "cpu":
        keep_freed_memory()


def expected_platform(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str:
    """cpu, gpu or tpu, as jax will choose it: by JAX_PLATFORMS, else by the devices of this machine; without jax."""
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(asked, "cpu")
    tpu_names = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")
    if any(environment.get(name) for name in tpu_names) or any((root / "dev").glob("accel[0-9]*")):
        return "tpu"
    # kfd is of AMD. Windows lends WSL2 any GPU as dxg, and NVIDIA's with CUDA, for which jax has a plugin.
    found = any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev/kfd").exists()
    lent = (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists()
    return "gpu" if found or lent else "cpu"


def cpu_devices(environment: Mapping[str, str] = os.environ) -> int:
    """The devices that jax makes of this machine's CPU; without jax."""
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
    return int(environment.get("JAX_NUM_CPU_DEVICES") or 0) or int(forced[-1] if forced else 1)


def require_platform() -> None:
    """Raises InputError on Windows itself."""
    if sys.platform == "win32":
        raise InputError("Windows itself is not supported: wanted Linux, macOS, or WSL2 (wsl --install, then there)")


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

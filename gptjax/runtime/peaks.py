"""The peak arithmetic of a device: its data sheet's, or measured once on this machine and kept in the user's cache."""

import contextlib
import json
import math
import os
import platform
from pathlib import Path

import jax

from gptjax.runtime.dtype import product_seconds
from gptjax.runtime.hardware import sheet_flops
from gptjax.runtime.process import usable_cores
from gptjax.runtime.versions import cache_folder, version

SECONDS = 0.15  # of products of each size and type
DATA_SHEET, MEASURED = "data sheet", "measured on this machine"


def peak_flops(dtype: str, refresh: bool = False) -> tuple[float, str]:
    """FLOP/s of one device in this type, and where the number is from: DATA_SHEET or MEASURED.

    A device without a data sheet is measured at the first call on a machine, or with `refresh`; the number is kept by
    device, type and version of jax. CPU devices, of which XLA makes as many as it is told to, share the cores.
    """
    device = jax.local_devices()[0]
    known = sheet_flops(device.device_kind, dtype)
    if known is not None:
        return known, DATA_SHEET
    kept = 0.0 if refresh else _kept().get(_key(dtype), 0.0)
    if not kept:
        kept = _measured(dtype)
        keep_peak(dtype, kept / _sharing(), refresh)
    return kept / _sharing(), MEASURED


def keep_peak(dtype: str, flops: float, refresh: bool = False) -> None:
    """Keeps FLOP/s of one device that were reached, where they are more than is kept; with `refresh` in any case."""
    peaks, whole = _kept(), flops * _sharing()
    if refresh or whole > peaks.get(_key(dtype), 0.0):
        path = _path()
        new = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full or read-only disk: then it is measured again at the next start
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(peaks | {_key(dtype): whole}, indent=1) + "\n")
            os.replace(new, path)


def _measured(dtype: str) -> float:
    """FLOP/s of the fastest product, also of float32: a device that is slow at a type can compute it in that one."""
    dtypes, on_cpu = {dtype, "float32"}, jax.local_devices()[0].platform == "cpu"
    sizes = (512, 1024) if on_cpu else (4096, 8192)
    times = {size: product_seconds(size, dtypes, SECONDS * len(dtypes)).values() for size in sizes}
    return max(2 * size**3 / min(shortest) for size, shortest in times.items())


def _sharing() -> int:
    """Devices of this process that share what was measured: the fake devices of a CPU."""
    return jax.local_device_count() if jax.local_devices()[0].platform == "cpu" else 1


def _key(dtype: str) -> str:
    device = jax.local_devices()[0]
    cpu = f"{_processor()}, {usable_cores()} cores, " if device.platform == "cpu" else ""
    return f"{device.device_kind}, {cpu}{dtype}, jax {version('jax')}"


def _processor() -> str:
    """The model of the CPU: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = ("model name", "cpu family", "model", "stepping")
    return " ".join(line.partition(":")[2].strip() for line in lines[:26] if line.split("\t")[0].strip() in names)


def _path() -> Path:
    return cache_folder() / "peaks.json"


def _kept() -> dict[str, float]:
    """The peaks by device; empty where none were kept, or the file can't be read: then they are measured again."""
    try:
        peaks = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    numbers = peaks.items() if isinstance(peaks, dict) else ()
    return {key: float(x) for key, x in numbers if isinstance(x, int | float) and 0 < x < math.inf}

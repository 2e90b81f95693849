"""Probes of the machine: its devices, memory, cores, folders and clock."""

import contextlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.diagnostics.doctor.finding import Finding, Level
from gptjax.runtime.compile_cache import compile_cache_folder, others_can_write
from gptjax.runtime.hardware import first_line, host_memory
from gptjax.runtime.peaks import peak_flops
from gptjax.runtime.process import expected_platform, usable_cores

GIB = 2**30
# A checkpoint of a 124M model is 1.5 GB: at 50 MB/s it takes half a minute. At 5 MB/s the run waits for its saves.
SLOW, TOO_SLOW = 50e6, 5e6
WRITE_BYTES, WRITE_SECONDS, CHUNK = 64 * 2**20, 3.0, 4 * 2**20
LITTLE_SPACE, NO_SPACE = 20 * GIB, 1 * GIB
SKEW = 2.0  # seconds between two clocks


def devices() -> Finding:
    """The devices of jax; a problem where the machine has a faster kind that jax does not use."""
    all_devices, local = jax.devices(), jax.local_devices()
    kinds = sorted({device.device_kind for device in all_devices})
    sizes = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in local]
    memory = f", {min(sizes) / GIB:.1f} GiB each" if min(sizes) else ""
    data = {"platform": local[0].platform, "kinds": kinds, "count": len(all_devices), "local": len(local),
            "processes": jax.process_count(), "bytes": min(sizes)}  # fmt: skip
    text = (
        f"{len(all_devices)} x {', '.join(kinds)}{memory}, {jax.process_count()} process(es), jax on {data['platform']}"
    )
    expected = expected_platform()
    used = {"cuda": "gpu", "rocm": "gpu"}.get(local[0].platform, local[0].platform)
    if expected != used:
        extra = "tpu" if expected == "tpu" else "cuda12"
        advice = f"pip install 'jax[{extra}]=={jax.__version__}', and look at the lines 'versions'"
        return Finding("devices", "PROBLEM", f"{text}, but this machine has a {expected}", advice, data)
    if len(kinds) > 1:
        return Finding("devices", "warning", text, "a mesh of different devices runs at the pace of the slowest", data)
    return Finding("devices", "ok", text, data=data)


def arithmetic() -> Finding:
    """Compares single operations and a compiled product of small integers with NumPy, on each local device."""
    a, b = (np.random.default_rng(i).integers(-8, 9, (256, 256)).astype(np.float32) for i in range(2))
    product, wrong = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest")), []
    for device in jax.local_devices():
        x, y = jax.device_put((a, b), device)
        pairs = {"x + 1": (x + 1, a + 1), "x * y": (x * y, a * b), "sqrt": (jnp.sqrt(x * x), np.abs(a)),
                 "x @ y": (product(x, y), a @ b)}  # fmt: skip
        wrong += [f"{name} on {device}" for name, (got, want) in pairs.items() if not np.array_equal(got, want)]
    if wrong:
        advice = "do not train on it: try another jax version or driver, and that device alone in another machine"
        return Finding("arithmetic", "PROBLEM", f"wrong: {', '.join(wrong)}", advice, {"wrong": wrong})
    text = f"sums and products of known integers are exact on {jax.local_device_count()} device(s)"
    return Finding("arithmetic", "ok", text)


def peak() -> Finding:
    """The peak of one device in both types, measured anew where no data sheet says it: MFU is a share of it."""
    found = {dtype: peak_flops(dtype, refresh=True) for dtype in ("float32", "bfloat16")}
    text = ", ".join(f"{flops / 1e12:.4g} TFLOP/s in {dtype}" for dtype, (flops, _) in found.items())
    return Finding("peak", "ok", f"{text} ({found['float32'][1]})", data={d: flops for d, (flops, _) in found.items()})


def host() -> Finding:
    """Cores and memory that this process may use."""
    cores, (total, free) = _cores(), host_memory()
    data = {"cores": cores, "bytes": total, "free_bytes": free}
    text = f"{cores:g} cores, {total / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB free"
    advice = ""
    if free < 2 * GIB:
        advice = "end other programs, or ask the scheduler for more memory"
    elif cores < 2 * jax.local_device_count() and jax.local_devices()[0].platform != "cpu":
        advice = "ask for 2 cores a device: input and saves need them"
    return Finding("host", "warning" if advice else "ok", text, advice, data)


def _cores() -> float:
    """Cores that the scheduler and the container allow."""
    allowed = float(usable_cores())
    quota, _, period = first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(allowed, int(quota) / int(period)) if quota.isdecimal() and period.isdecimal() else allowed


def compile_cache() -> Finding:
    """The folder of compiled programs: its path and size; a problem where other users could write into it."""
    folder = compile_cache_folder()
    if not folder.exists():
        place = _existing(folder)
        ok = place.is_dir() and os.access(place, os.W_OK)
        text = f"{folder} does not exist yet"
        return Finding("cache", "ok", text) if ok else Finding(
            "cache", "PROBLEM", f"{text}, and {place} can't be written", "set XDG_CACHE_HOME, or --no-compile-cache"
        )  # fmt: skip
    mode, files = stat.S_IMODE(folder.stat().st_mode), [p.stat().st_size for p in folder.iterdir() if p.is_file()]
    text = f"{folder}, mode {mode:04o}, {len(files)} files, {sum(files) / 1e6:,.0f} MB"
    data = {"folder": str(folder), "mode": f"{mode:04o}", "files": len(files), "bytes": sum(files)}
    if others_can_write(folder):
        return Finding("cache", "PROBLEM", f"{text}: others can write there", f"chmod 700 {folder}", data)
    if not os.access(folder, os.W_OK):
        advice = "set XDG_CACHE_HOME to a folder of yours, or give --no-compile-cache"
        return Finding("cache", "PROBLEM", f"{text}: it can't be written", advice, data)
    if sum(files) > 20 * GIB:
        return Finding("cache", "warning", text, "remove it when no run is starting; it is filled again", data)
    return Finding("cache", "ok", text, data=data)


def run_folder(folder: str) -> Iterator[Finding]:
    """Write speed with fsync in the folder of runs; its free space, and its clock against this machine's."""
    if "://" in folder:
        yield Finding("run folder", "warning", f"{folder} is an object store, whose speed is not measured here")
        return
    asked, place = Path(folder).absolute(), _existing(Path(folder).absolute())
    name = str(asked) if place == asked else f"{place} (where {asked} will be)"
    probe = place / f".gptjax-doctor-{uuid.uuid4().hex}"  # hosts that share the folder may have equal process ids
    try:
        rate, fsync, skew = _write(probe)
    except OSError as e:
        advice = "give another --run-dir, or make it writable"
        yield Finding("run folder", "PROBLEM", f"{name} can't be written ({e.strerror})", advice)
        return
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    level: Level = "PROBLEM" if rate < TOO_SLOW else "warning" if rate < SLOW else "ok"
    advice = "use a local or a parallel file system: every save waits for it" if level != "ok" else ""
    data: dict[str, Any] = {"folder": str(place), "bytes_per_second": rate, "fsync_seconds": fsync}
    text = f"{name}: writes {rate / 1e6:,.0f} MB/s to the disk, a small file takes {fsync * 1e3:.1f} ms"
    yield Finding("run folder", level, text, advice, data)
    free = shutil.disk_usage(place).free
    level = "PROBLEM" if free < NO_SPACE else "warning" if free < LITTLE_SPACE else "ok"
    advice = "free some: a checkpoint has 12 bytes a parameter, and two are kept" if level != "ok" else ""
    yield Finding("disk space", level, f"{free / GIB:,.1f} GiB free at {place}", advice, {"free_bytes": free})
    if abs(skew) > SKEW:
        text = f"files at {place} are dated {skew:+.1f} s from this machine's clock"
        yield Finding("clock", "warning", text, "have chrony or ntpd set the clocks of all hosts", {"skew": skew})
    else:
        data = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "skew": skew}
        yield Finding("clock", "ok", f"{data['time']}, {abs(skew):.1f} s from the run folder's", data=data)


def _write(probe: Path) -> tuple[float, float, float]:
    """(bytes a second of a large file with fsync, seconds of a small one, seconds of its date ahead of the clock)."""
    chunk, written, start = os.urandom(CHUNK), 0, time.perf_counter()
    with probe.open("wb") as file:
        while written < WRITE_BYTES and time.perf_counter() - start < WRITE_SECONDS:
            file.write(chunk)
            file.flush()
            os.fsync(file.fileno())  # after every chunk, so that a slow disk is noticed in time
            written += len(chunk)
    rate = written / (time.perf_counter() - start)
    small = []
    for _ in range(5):
        start = time.perf_counter()
        with probe.open("wb") as file:
            file.write(b"1")
            file.flush()
            os.fsync(file.fileno())
        small.append(time.perf_counter() - start)
    return rate, sorted(small)[len(small) // 2], probe.stat().st_mtime - time.time()


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    return next(place for place in (folder, *folder.parents) if place.exists())

"""Flags for XLA by platform, set before jax starts, and only those that the XLA installed here knows.

An unknown flag ends the process, and flags come and go with versions: so a process of its own tries them first, once
for each version. Nothing here imports jax.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptjax.runtime.versions import cache_folder, version

# Only what XLA does not do by itself. No flag of GPU or TPU was measured by us: each has its reason, not a number.
#
# CPU: vector width, oneDNN, XNNPACK and fast math were all measured to be within the noise.
#
# GPU: asynchronous collectives, their stream of highest priority and the pipelining of reduce-scatters are defaults of
# jaxlib 0.10.2 and 0.12.0 (a test looks), and so are left out.
#
# TPU: nothing. libtpu 0.0.52, compiling a scan over layers with fsdp for a v5e:2x4 slice, makes its collectives
# asynchronous and fuses them with products, unasked: the six flags that recipes publish for it (async_collective_fusion
# with its fuse_all_gather and multiple_steps, overlap_compute_collective_tc, async all_gather and collective_permute)
# left its program as it was. Others concern single generations (SparseCore), and two groups of them together gave NaN
# (AI-Hypercomputer/maxdiffusion#429, v6e). Who wants them sets LIBTPU_INIT_ARGS, which stays as it is; and trying
# flags here would take the TPU (on a slice: wait for its other hosts).
FLAGS: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "gpu": (
        # Starts collectives early and waits for them late, so that products run meanwhile. Off in jaxlib 0.10.2; 0.12
        # leaves it to its level of optimisation.
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        # With fsdp, in the scan over layers: the next layer's weights are gathered during this one's products.
        "--xla_gpu_enable_pipelined_all_gather=true",
        # With data: in the scan over micro-batches, one's reduction runs during the next one's products.
        "--xla_gpu_enable_pipelined_all_reduce=true",
    ),
    "tpu": (),
}
VARIABLE = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}

_PROGRAM = "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"
_SECONDS = 60.0  # that a try may take; jax starts in one to ten
_PACKAGES = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")  # each holds an XLA with flags of its own


def set_xla_flags() -> None:
    """Adds the platform's flags to the environment, less those that the user set and those that XLA does not know."""
    name = platform()
    variable = VARIABLE[name]
    given = os.environ.get(variable, "")
    if given.strip() and not given.lstrip().startswith("-"):
        return  # XLA takes it for the name of a file that holds the flags
    wanted = [flag for flag in FLAGS[name] if _name(flag) not in {_name(word) for word in given.split()}]
    if wanted and (known := known_flags(wanted, variable)):
        os.environ[variable] = " ".join([*given.split(), *known])


def platform(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str:
    """cpu, gpu or tpu, as jax will choose it: by JAX_PLATFORMS, else by the devices that are there."""
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(asked, "cpu")
    tpu_names = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")
    if any(environment.get(name) for name in tpu_names) or any(devices.glob("accel[0-9]*")):
        return "tpu"
    return "gpu" if any(devices.glob("nvidia[0-9]*")) or (devices / "kfd").exists() else "cpu"


def known_flags(flags: Sequence[str], variable: str) -> list[str]:
    """Those of the flags that this XLA starts with; what is left out is told in a line on stderr.

    They are tried in a process of its own, once: the answer is kept in the user's cache folder by version.
    """
    versions = [f"{name} {version(name)}" for name in _PACKAGES]
    key = hashlib.sha256(json.dumps([versions, variable, list(flags)]).encode()).hexdigest()
    path = cache_folder() / "xla_flags.json"
    kept = _read(path)
    if key in kept:
        return [flag for flag in flags if flag in kept[key]]
    known, why = _tried(flags, variable)
    if why != _NO_START and (left := [flag for flag in flags if flag not in known]):
        print(f"left out of {variable}: {' '.join(left)} ({why})", file=sys.stderr, flush=True)
    if why in ("", _UNKNOWN):  # any other reason may be gone the next time
        _write(path, kept | {key: known})
    return known


_UNKNOWN = "unknown to this XLA"
_NO_START = "jax does not start"  # for a reason that it gives itself: the caller's own start reports it


def _tried(flags: Sequence[str], variable: str) -> tuple[list[str], str]:
    """The flags with which jax starts, and why there are no more of them."""
    known, why = list(flags), ""
    while known:
        # The try must not take the memory that the run will want.
        env = {**os.environ, variable: " ".join(known), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-c", _PROGRAM]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return [], f"trying took more than {_SECONDS:.0f} s"
        if done.returncode == 0:
            break
        if "Traceback" in done.stderr:
            return [], _NO_START
        lines = [line for line in done.stderr.splitlines() if "Unknown flag" in line]
        unknown = {_name(word) for line in lines for word in re.findall(r"--\w+", line)}
        left = [flag for flag in known if _name(flag) not in unknown]
        why = _UNKNOWN if len(left) < len(known) else f"jax does not start with them: {done.returncode}"
        known = left if len(left) < len(known) else []
    return known, why


def _name(flag: str) -> str:
    return flag.split("=")[0]


def _read(path: Path) -> dict[str, list[str]]:
    """What was kept; a file that can't be read is made anew. It can only leave flags out, so it need not be trusted."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(path: Path, kept: dict[str, list[str]]) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        os.replace(new, path)
    except OSError:  # then the next start tries them again
        new.unlink(missing_ok=True)

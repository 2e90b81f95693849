"""Compiles the real training step for absent devices in a subprocess, and reads its memory on each device.

TPUs: libtpu compiles for any slice on a CPU. It lays out the memory within seconds and then writes machine code for a
minute; without `code` the process stops once the files that XLA dumps on the way give its memory. Anything else is
compiled for that many fake CPU devices.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import TrainConfig
from gptjax.config.section import InputError, build, leaves, one_line

# libtpu probes the local machine unless these are set; the accelerator type here is a dummy.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_MODULE = "jit_train_step"


class UnknownTopology(InputError):
    """This libtpu does not know the topology, as one that is older than the chip."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The target of a compilation: a TPU topology by libtpu's name (v5e:4x4), or a number of fake CPU devices."""

    devices: int
    tpu: str = ""
    megacore: bool = False
    """The two cores of a chip are one device (v4, v5p)."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The result of compiling a step: bytes on each device, or the error where it does not fit."""

    fits: bool
    seconds: float
    arguments: int = 0
    outputs: int = 0
    aliases: int = 0
    temporaries: int = 0
    error: str = ""
    findings: tuple[str, ...] = ()
    """The sharding lint's findings in the compiled program."""
    code: bool = False
    """True where machine code was made, not only the layout of the memory."""

    @property
    def total(self) -> int:
        """Bytes of arguments, outputs that do not alias them, and temporaries."""
        return self.arguments + self.outputs - self.aliases + self.temporaries


def has_libtpu() -> bool:
    """True where libtpu is installed, which compiles steps for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def compile_for(
    config: TrainConfig, target: Target, *, seconds: float = 600, code: bool = False, images: int = 0
) -> Compiled:
    """Compiles the step of these settings, with all mesh sizes given, within `seconds`, and reads its memory.

    A row has so many `images`. Raises InputError where compiling takes longer, or fails for another reason than too
    little memory, UnknownTopology where libtpu can't.
    """
    with tempfile.TemporaryDirectory(prefix="gptjax-plan-") as folder:
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={_MODULE}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        if target.tpu:
            env |= TPU_ENVIRONMENT
        else:
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={target.devices}"
        root = str(Path(__file__).parents[3])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), root, os.environ.get("PYTHONPATH", "")]))
        request = {"config": dict(leaves(config)), "target": dataclasses.asdict(target), "code": code, "folder": folder,
                   "images": images}  # fmt: skip
        command = [sys.executable, "-m", "gptjax.diagnostics.plan.compiled"]
        start = time.perf_counter()
        given: Any = {"input": json.dumps(request), "capture_output": True, "text": True, "timeout": seconds}
        try:
            done = subprocess.run(command, env=env, **given)
        except subprocess.TimeoutExpired:
            line = f"compiling took more than {seconds:.0f} s; give fewer layers, or --model.unroll 1"
            raise InputError(line) from None
        taken = time.perf_counter() - start
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["without a message"])[-1]
        raise InputError(f"the step can't be compiled: {last}")
    result = json.loads(lines[-1])
    if "input_error" in result:
        raise (UnknownTopology if result["unknown"] else InputError)(result["input_error"])
    return Compiled(**result | {"findings": tuple(result.get("findings", ())), "seconds": round(taken, 2)})


def main() -> None:
    """The subprocess: reads a request from stdin and prints one JSON object."""
    request = json.load(sys.stdin)
    config, target = build(TrainConfig, request["config"]), Target(**request["target"])
    try:
        result = _compile(config, target, Path(request["folder"]), request["code"], request["images"])
    except InputError as e:
        result = {"input_error": str(e), "unknown": isinstance(e, UnknownTopology)}
    print(json.dumps(result), flush=True)
    os._exit(0)  # the compiler may still run in a thread that can't be stopped


def _compile(config: TrainConfig, target: Target, folder: Path, code: bool, images: int) -> dict[str, Any]:
    import jax

    from gptjax.config import check_divisible
    from gptjax.data.packing import example_batch
    from gptjax.parallel.sharding import abstract, make_mesh
    from gptjax.parallel.sharding_lint import findings
    from gptjax.training.build import build_components
    from gptjax.training.step import compile_step, run_in_background

    devices = _devices(target)
    mesh = make_mesh(dataclasses.replace(config.mesh, slices=1), devices)  # the devices of a topology form one slice
    check_divisible(config, mesh.shape)
    parts = build_components(config)
    with jax.set_mesh(mesh):
        state = abstract(jax.eval_shape(parts.init, 0), mesh)
        rows = example_batch(config.data.batch_size, config.data.length, config.model.vision, images)
        batch = abstract(rows, mesh)
        step = compile_step(parts.step, mesh, state, {}, batch).lower(state, {}, batch)
        thread = run_in_background(step.compile, mesh)

        def lint(program: str) -> list[str]:
            return findings(config, dict(mesh.shape), state, batch, program)

        while target.tpu and not code and not thread.done():
            if files := _files(folder):
                assignment, program = files
                return {"fits": True, "findings": lint(program)} | memory_of(assignment)
            time.sleep(0.05)
    try:
        compiled = thread.result()
    except jax.errors.JaxRuntimeError as e:
        message = str(e)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        return {"fits": False, "error": _memory_error(message)}
    stats = compiled.memory_analysis()
    return {
        "fits": True, "code": True, "arguments": stats.argument_size_in_bytes, "outputs": stats.output_size_in_bytes,
        "aliases": stats.alias_size_in_bytes, "temporaries": stats.temp_size_in_bytes,
        "findings": lint(compiled.as_text()),
    }  # fmt: skip


def _devices(target: Target) -> Any:
    """The devices to compile for."""
    import jax

    if not target.tpu:
        return jax.devices()[: target.devices]
    from jax.experimental import topologies

    more = {"chip_config_name": "megacore"} if target.megacore else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.tpu, **more).devices
    except Exception as e:
        raise UnknownTopology(f"libtpu knows no topology {target.tpu}: {one_line(e)}") from e


def _memory_error(message: str) -> str:
    match = re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", message)
    return f"temporaries of {match[1]}iB, memory of {match[2]}iB" if match else one_line(message, 200)


def _files(folder: Path) -> tuple[str, str] | None:
    """The buffer assignment and the program that XLA dumps once memory is laid out; None before that."""
    names = ("after_optimizations-buffer-assignment", "after_optimizations_after_buffer_assignment")  # in this order
    paths = [next(folder.glob(f"*{_MODULE}*{name}.txt"), None) for name in names]
    if paths[0] is None or paths[1] is None:
        return None
    assignment, program = (path.read_text(encoding="utf-8", errors="replace") for path in paths if path)
    # The last file may be incomplete: a whole one closes its last computation.
    return (assignment, program) if program.rstrip().endswith("}") else None


def memory_of(assignment: str) -> dict[str, int]:
    """Bytes of arguments, outputs, aliases and temporaries in a device's main memory, from a buffer assignment.

    Outputs in the donated state's memory are aliases. Memories with a color above 0 are on the chip.
    """
    arguments = outputs = aliases = temporaries = 0
    for line in re.findall(r"^allocation \d+: (.*)$", assignment, re.MULTILINE):
        size = int(re.match(r"size (\d+)", line)[1])  # pyright: ignore[reportOptionalSubscript]
        if re.search(r"color [1-9]", line):
            continue
        given, live = "parameter " in line, "maybe-live-out" in line
        arguments += size * given
        aliases += size * (given and live)
        outputs += size * live
        temporaries += size * ("preallocated-temp" in line and not given and not live)
    return {"arguments": arguments, "outputs": outputs, "aliases": aliases, "temporaries": temporaries}


if __name__ == "__main__":
    main()

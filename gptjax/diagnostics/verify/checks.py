"""The checks of `gptjax verify`, and its report.

Settings may agree and share a fault. So it also checks that no output depends on the future or on another document, and
that cached decoding, which can't see the future, equals the full forward pass.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import MeshConfig
from gptjax.config.checks import VerifyConfig
from gptjax.config.section import one_line
from gptjax.diagnostics.verify import numbers
from gptjax.diagnostics.verify.settings import (
    PLATFORM_KERNELS,
    Setting,
    mesh_name,
    meshes,
    settings,
    sizes,
    unsupported_kernel,
)
from gptjax.model.cache import empty_cache
from gptjax.parallel.processes import wait_for_reports
from gptjax.parallel.sharding import num_slices, on_host, to_global
from gptjax.runs.run import environment
from gptjax.runtime.process import usable_cores
from gptjax.storage import write_json

LOGITS_BOUND, START_BOUND = 1e-5, 1e-6  # relative to the largest logit (cache), and to the largest initial weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a check: distances from the reference, and the problem where they exceed the bounds."""

    name: str
    loss: float = 0.0
    gradient: float = 0.0
    leaf: str = ""
    problem: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        columns = f"{'FAILED' if self.problem else 'ok':6}  {self.loss:8.1e}  {self.gradient:8.1e}  {self.name}"
        return f"{columns}: {self.problem}" if self.problem else columns


HEADER = (
    "each setting against one device: the worst of ten losses, relative (at most "
    f"{numbers.LOSS_BOUND:g}), and the worst leaf of the gradient in its scale (at most {numbers.GRADIENT_BOUND:g})\n"
    "verdict     loss  gradient  setting"
)


def verify(cfg: VerifyConfig, say: Callable[[str], None]) -> bool:
    """Runs every check on this machine's devices, with a line for each, and returns True where all pass.

    With cfg.json the results are written to that file too. Of several processes the first reports, and any with a
    problem.
    """
    start, results, first = time.perf_counter(), [], jax.process_index() == 0
    if cfg.json and first:
        write_json(cfg.json, {"ok": False, "results": []})  # fails now where it can't be written
    for name in PLATFORM_KERNELS:
        if first and (reason := unsupported_kernel(name)):
            say(f"attention {name} is not tried: {reason}")
    if first:
        say(HEADER)
    # Most of the time is compilation, which XLA does without Python's lock. Several processes must keep one order.
    threads = 1 if jax.process_count() > 1 else max(1, min(4, usable_cores()))
    with ThreadPoolExecutor(threads, "compile") as pool:
        for name, check in checks(pool):
            began = time.perf_counter()
            try:
                result = check(name)
            except Exception as e:  # a failure like any other; the rest is still checked
                result = Result(name=name, problem=f"{type(e).__name__}: {one_line(e)}")
            results.append(dataclasses.replace(result, seconds=time.perf_counter() - began))
            if first or result.problem:
                say(str(results[-1]))
    failed, seconds, devices = [r for r in results if r.problem], time.perf_counter() - start, jax.devices()
    if cfg.json and first:
        entries = [dataclasses.asdict(r) | {"ok": not r.problem} for r in results]
        report = environment() | {"ok": not failed, "seconds": seconds, "results": entries}
        write_json(cfg.json, report)
    shown = f"{len(devices)} {devices[0].device_kind} device(s), {seconds:.0f} s"
    if failed:
        advice = "do not train with what failed: update jax and drivers, or leave that setting out"
        say(f"verify: FAILED {len(failed)} of {len(results)} checks on {shown}; {advice}")
    elif first:
        say(f"verify: the same numbers in all {len(results)} checks on {shown}")
    wait_for_reports()
    return not failed


def checks(pool: ThreadPoolExecutor) -> Iterator[tuple[str, Callable[[str], Result]]]:
    """The name and function of each check; programs are compiled ahead in the pool."""
    over = meshes(jax.device_count(), num_slices(jax.devices()))
    tried, most = settings(over), max(over, key=lambda mesh: sum(n > 1 for n in sizes(mesh)))
    references = list(dict.fromkeys(setting.reference for setting in tried))
    starts = [(setting.family, mesh) for mesh in (None, most) for setting in references]
    list(pool.map(lambda start: numbers.first_state(*start), starts))  # before any setting needs it
    programs = {setting: pool.submit(numbers.compiled, setting) for setting in (*references, *tried)}
    wanted = {setting.family: numbers.run(setting, programs.pop(setting).result()) for setting in references}
    for setting in tried:
        yield str(setting), functools.partial(same, setting, programs.pop(setting), wanted[setting.family])
    for mesh in dict.fromkeys((None, most)):
        for family in ("gpt2", "llama"):
            yield f"{family} {mesh_name(mesh)} cached decoding", functools.partial(cache_is_exact, family, mesh)
        for attention in ("plain", "blockwise"):
            name = f"gpt2 {mesh_name(mesh)} {attention}, no future and no other document seen"
            yield name, functools.partial(nothing_leaks, Setting(family="gpt2", mesh=mesh, attention=attention))
    for family, _ in starts[: len(references)]:
        yield f"{family} {mesh_name(most)} initial weights", functools.partial(same_start, family, most)


def same(setting: Setting, program: Future, reference: numbers.Numbers, name: str) -> Result:
    """Checks that a setting trains as its reference does, within the bounds of its type."""
    far = numbers.difference(numbers.run(setting, program.result()), reference)
    loss_bound, bound = numbers.bounds(setting)
    problems = []
    if far.loss > loss_bound:
        problems.append(f"the losses differ by {far.loss:.1e} of their size, wanted at most {loss_bound:g}")
    if far.gradient > bound:
        problems.append(f"the gradient of {far.leaf} differs by {far.gradient:.1e}, wanted at most {bound:g}")
    return Result(name=name, problem=" and ".join(problems), **far._asdict())


def same_start(family: str, mesh: MeshConfig, name: str) -> Result:
    """Checks that the initial weights made on a mesh are those made on one device, but for rounding."""
    one, over = numbers.first_state(family).params, numbers.first_state(family, mesh).params
    far = numbers.difference(numbers.Numbers([1.0], over), numbers.Numbers([1.0], one))
    problem = f"{far.leaf} differs by {far.gradient:.1e} of its size" if far.gradient > START_BOUND else ""
    return Result(name=name, gradient=far.gradient, leaf=far.leaf, problem=problem)


def cache_is_exact(family: str, mesh: MeshConfig | None, name: str) -> Result:
    """Checks that prefill and decoding token by token give the logits of the full forward pass."""
    decoder, over, start = numbers.decoder_of(Setting(family=family)), numbers.device_mesh(mesh), 5
    ids_BL = np.random.default_rng(0).integers(0, numbers.VOCAB, (8, numbers.LENGTH), dtype=np.int32)
    place_BL = np.broadcast_to(np.arange(numbers.LENGTH, dtype=np.int32), ids_BL.shape)

    def both(params: Any, ids_BL: jax.Array, place_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        def apply(*inputs: jax.Array, **more: Any) -> tuple[Any, Any]:
            x_BLD, cache = decoder.apply({"params": params}, *inputs, **more)
            return decoder.apply({"params": params}, x_BLD, method="logits"), cache

        def step(cache: Any, i: jax.Array) -> tuple[Any, jax.Array]:
            ids_B1, place_B1 = (jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1) for x in (ids_BL, place_BL))
            logits_BLV, cache = apply(ids_B1, place_B1, cache=cache)
            return cache, logits_BLV[:, 0]

        cache = empty_cache(decoder.cfg, len(ids_BL), numbers.LENGTH, decoder.cfg.dtype)
        prompt_BLV, cache = apply(ids_BL[:, :start], place_BL[:, :start], cache=cache)
        _, rest_LBV = jax.lax.scan(step, cache, jnp.arange(start, numbers.LENGTH))
        cached_BLV = jnp.concatenate([prompt_BLV, jnp.moveaxis(rest_LBV, 0, 1)], axis=1)
        return apply(ids_BL, place_BL, jnp.ones_like(ids_BL))[0], cached_BLV

    with jax.set_mesh(over), jax.default_matmul_precision("highest"):
        inputs = to_global({"ids_BL": ids_BL, "place_BL": place_BL}, over)
        params = to_global(numbers.first_state(family).params, over)
        full_BLV, cached_BLV = on_host(jax.jit(both)(params, inputs["ids_BL"], inputs["place_BL"]))
    full_BLV, cached_BLV = full_BLV[..., : numbers.VOCAB], cached_BLV[..., : numbers.VOCAB]  # the others are masked
    far = numbers.finite(float(np.abs(cached_BLV - full_BLV).max() / np.abs(full_BLV).max()))
    problem = f"logits differ by {far:.1e} of the largest, wanted at most {LOGITS_BOUND:g}"
    return Result(name=name, loss=far, problem=problem if far > LOGITS_BOUND else "")


def nothing_leaks(setting: Setting, name: str) -> Result:
    """Checks that a changed token changes the output at its position, and none before it or in another document."""
    decoder, over = numbers.decoder_of(setting), numbers.device_mesh(setting.mesh)
    before = numbers.batch(0, "packed", numbers.num_rows())
    segments_BL = before["segments_BL"]
    place_B = (segments_BL == 2).argmax(axis=1) + 1  # in the middle document, but not where it begins
    rows_B = np.arange(len(place_B))
    after = before | {"inputs_BL": before["inputs_BL"].copy()}
    after["inputs_BL"][rows_B, place_B] = (after["inputs_BL"][rows_B, place_B] + 1) % numbers.VOCAB
    with jax.set_mesh(over), jax.default_matmul_precision("highest"):
        params = to_global(numbers.first_state(setting.family).params, over)

        @jax.jit
        def forward(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
            inputs = (batch[f"{x}_BL"] for x in ("inputs", "positions", "segments"))
            return decoder.apply({"params": params}, *inputs)[0]

        a_BLD, b_BLD = (on_host(forward(params, to_global(x, over))) for x in (before, after))
    changed_BL = (a_BLD != b_BLD).any(axis=-1)
    may_BL = (np.arange(numbers.LENGTH) >= place_B[:, None]) & (segments_BL == 2)
    if (changed_BL & ~may_BL).any():
        row, column = np.argwhere(changed_BL & ~may_BL)[0].tolist()
        where = "the past" if column < place_B[row] else "another document"
        return Result(name=name, problem=f"row {row}: the token at {place_B[row]} changes {where}, at {column}")
    unseen = not changed_BL[rows_B, place_B].all()
    return Result(name=name, problem="a changed token does not change the output at its position" if unseen else "")

"""Test of the collectives: known integers through every one, over every axis of a mesh, compared exactly.

Numbers are integers below 2^24 as float32, the type of gradients, so that sums are exact in any order. Each process
compares the shards of its own devices.
"""

import functools
import itertools
import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptjax.diagnostics.doctor.finding import Finding
from gptjax.parallel.sharding import AXES

P = jax.P

SIZES = (256 * 2**10, 4 * 2**20)  # bytes of the larger side of a collective on each device
ADVICE = "do not train on these devices: check cables, drivers and NCCL_* or XLA flags, then each host alone"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "permute")


def sizes_over_axes(count: int) -> list[int]:
    """Sizes of the axes whose product is count: its prime factors, dealt out so that many axes are used."""
    factors, n = [], count
    for p in itertools.chain([2], range(3, count + 1, 2)):
        while n % p == 0:
            factors.append(p)
            n //= p
    return [math.prod(factors[i :: len(AXES)]) for i in range(len(AXES))]


def check_collectives() -> list[Finding]:
    """One finding for each size and group of axes with wrong results, or one that all are right."""
    count = jax.device_count()
    if count == 1:
        return [Finding("collectives", "ok", "one device: nothing to exchange")]
    # Not make_mesh, which wants axes that suit the network: here every group of devices must exchange.
    mesh = Mesh(np.array(jax.devices()).reshape(sizes_over_axes(count)), AXES)
    groups = [(axis,) for axis in AXES if mesh.shape[axis] > 1]
    groups += [AXES] if len(groups) > 1 else []
    wrong, seconds = [], {}
    for size, axes in itertools.product(SIZES, groups):
        name = "+".join(axis for axis in axes if mesh.shape[axis] > 1)
        shown = f"{size // 1024} KiB over {name}={math.prod(mesh.shape[a] for a in axes)}"
        failed, seconds[shown] = check_axes(mesh, axes, size)
        if failed:
            text = f"{', '.join(failed)} of {shown} gave wrong numbers"
            data = {"size": size, "axes": axes, "wrong": failed}
            wrong.append(Finding("collectives", "PROBLEM", text, ADVICE, data))
    if wrong:
        return wrong
    over = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
    sizes = " and ".join(f"{size // 1024} KiB" for size in SIZES)
    text = (f"{', '.join(COLLECTIVES)} of {sizes} are exact over {over} and all {count} devices, "
            f"the slowest five in {max(seconds.values()) * 1e3:.1f} ms")  # fmt: skip
    return [Finding("collectives", "ok", text, data={"seconds": seconds})]


def check_axes(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[list[str], float]:
    """Returns (the collectives with wrong results over these axes of the mesh, seconds of all five)."""
    parts = math.prod(mesh.shape[axis] for axis in axes)
    length = size // 4 // parts * parts
    given = known_integers(mesh.size, length)
    rows = NamedSharding(mesh, P(AXES))
    sent = jax.make_array_from_callback(given.shape, rows, lambda index: given[index])
    exchange = jax.jit(jax.shard_map(
        functools.partial(_exchange, axes, parts), mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False
    ))  # fmt: skip
    jax.block_until_ready(exchange(sent))
    start = time.perf_counter()
    got = jax.block_until_ready(exchange(sent))
    seconds = time.perf_counter() - start

    def right(name: str) -> bool:
        for shard in got[name].addressable_shards:
            row = shard.index[0].start or 0
            if not np.array_equal(np.asarray(shard.data)[0], expected(name, given, members(mesh, axes, row), row)):
                return False
        return True

    return [name for name in COLLECTIVES if not right(name)], seconds


def known_integers(rows: int, length: int) -> np.ndarray:
    """The integers on each device, [rows, length]: below 1,021, so that the sum over 16,000 devices is below 2^24."""
    places = np.arange(length, dtype=np.int64)[None, :]
    return ((places * 7 + np.arange(rows)[:, None] * 379) % 1021).astype(np.float32)


def _exchange(axes: tuple[str, ...], parts: int, x_1L: jax.Array) -> dict[str, jax.Array]:
    x_L = x_1L[0]
    ring = [(i, (i + 1) % parts) for i in range(parts)]
    out: dict[str, Any] = {
        "all-gather": jax.lax.all_gather(x_L[: len(x_L) // parts], axes, tiled=True),
        "all-reduce": jax.lax.psum(x_L, axes),
        "reduce-scatter": jax.lax.psum_scatter(x_L, axes, tiled=True),
        "all-to-all": jax.lax.all_to_all(x_L, axes, 0, 0, tiled=True),
        "permute": jax.lax.ppermute(x_L, axes, ring),
    }
    return {name: y[None] for name, y in out.items()}


def members(mesh: Mesh, axes: tuple[str, ...], row: int) -> list[int]:
    """The rows (devices in the order of the mesh) that exchange with this row, in the order of the axes."""
    shape = tuple(mesh.shape[axis] for axis in AXES)
    at = np.unravel_index(row, shape)
    ranges = [range(n) if axis in axes else [int(i)] for axis, n, i in zip(AXES, shape, at, strict=True)]
    return [int(np.ravel_multi_index(place, shape)) for place in itertools.product(*ranges)]


def expected(name: str, given: np.ndarray, group: list[int], row: int) -> np.ndarray:
    """The result of a collective on device `row`, computed by NumPy."""
    parts, me = len(group), group.index(row)
    piece = given.shape[1] // parts
    if name == "all-gather":
        return np.concatenate([given[i, :piece] for i in group])
    if name == "all-to-all":
        return np.concatenate([given[i, me * piece : (me + 1) * piece] for i in group])
    if name == "permute":
        return given[group[me - 1]]
    total = given[group].sum(axis=0)
    return total if name == "all-reduce" else total[me * piece : (me + 1) * piece]

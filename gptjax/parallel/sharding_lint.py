"""Sharding lint: arrays that a compiled training step replicates although its mesh could shard them.

A lost constraint changes no number and raises nothing; it only costs memory and computation on every device.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from gptjax.config import TrainConfig
from gptjax.parallel.sharding import AXES, WHOLE_IF_UNEVEN, suffix

# A parameter of at least this share of a device's parameters should be sharded; smaller ones (norms, biases) stay whole
# on purpose, since gathering them would cost more.
LARGE_SHARE = 0.05

_LINE = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?:f32|bf16|f16)\[([\d,]+)\].*?op_name=\"([^\"]*)\"", re.MULTILINE)


def findings(config: TrainConfig, sizes: Mapping[str, int], state: Any, batch: Any, program: str) -> list[str]:
    """One line for each finding of a step.

    `state` and `batch` are trees of shapes with shardings; `program` is the partitioned HLO of one device
    (compiled.as_text()).
    """
    of_state = [*replicated_parameters(state.params, sizes), *unused_axes((state.params, batch), sizes)]
    return [*of_state, *whole_heads(state.params, sizes), *replicated_activations(config, sizes, program)]


def replicated_parameters(params: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Large parameters that every device holds whole, although the mesh has axes to shard them."""
    shared = sizes["fsdp"] * sizes["tensor"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    local_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for _, x in leaves)
    for path, x in leaves:
        size = math.prod(x.shape) * x.dtype.itemsize
        if shared > 1 and size > LARGE_SHARE * local_bytes and x.sharding.is_fully_replicated:
            yield (
                f"parameter {path[-1].key}, {size / 2**20:,.1f} MiB, is whole on each of the {shared} devices that "
                f"could share it"
            )


def unused_axes(trees: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Axes of the mesh that shard neither a parameter nor the batch, so that their devices all do the same work."""
    used: set[str] = set()
    for x in jax.tree.leaves(trees):
        for entry in x.sharding.spec:
            used |= {entry} if isinstance(entry, str) else set(entry or ())
    for axis in AXES:
        if sizes[axis] > 1 and axis not in used:
            yield f"mesh.{axis}={sizes[axis]} is not used: nothing lies over it, its devices all compute the same"


def whole_heads(params: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Heads that do not divide over mesh.tensor, so that every device holds and computes all of them."""
    reported: set[str] = set()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        for letter, size in zip(suffix(path[-1].key), x.shape):
            if letter in WHOLE_IF_UNEVEN and size % sizes["tensor"] and letter not in reported:
                reported.add(letter)
                kind = {"H": "query heads", "G": "key-value heads"}[letter]
                yield (
                    f"{path[-1].key}: {size} {kind} do not divide over mesh.tensor={sizes['tensor']}; every device "
                    f"holds all of them"
                )


def replicated_activations(config: TrainConfig, sizes: Mapping[str, int], program: str) -> Iterator[str]:
    """Activations that hold the rows of all devices at full width, each operation once, the largest first.

    Checks rows alone: positions that the context axis should shard, but does not, are not reported.
    """
    shards = sizes["data"] * sizes["fsdp"]
    rows = config.data.batch_size // config.optim.accumulate
    length = config.data.length // sizes["context"]
    if shards == 1:
        return
    largest: dict[str, tuple[int, str]] = {}
    for shape, name in _LINE.findall(program):
        dims = tuple(map(int, shape.split(",")))
        # All rows with a part of the width are an exchange of shards, not a replicated activation.
        width = _width(dims, rows, length)
        if width >= config.model.width and math.prod(dims) > largest.get(name, (0, ""))[0]:
            largest[name] = math.prod(dims), shape
    for name, (_, shape) in sorted(largest.items(), key=lambda kv: -kv[1][0]):
        yield f"activation [{shape}] of {_short(name)} holds all {rows} rows on every device, not {rows // shards}"


def _width(dims: tuple[int, ...], rows: int, length: int) -> int:
    """The product of the dimensions other than all rows and their length; 0 where dims lack these."""
    for i in range(len(dims)):
        if dims[i : i + 2] == (rows, length):
            return math.prod(dims[:i] + dims[i + 2 :])
        if dims[i] == rows * length and rows > 1:
            return math.prod(dims[:i] + dims[i + 1 :])
    return 0


def _short(name: str) -> str:
    """The part of an operation's name that locates it in the model: an einsum's equation, or the last two parts."""
    parts = [part for part in name.split("/") if part not in ("while", "body", "closed_call", "eval_jaxpr")]
    equation = next((part for part in reversed(parts) if "->" in part), "")
    return equation or "/".join(parts[-2:])

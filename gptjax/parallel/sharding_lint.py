"""The sharding lint: what a compiled training step holds whole on every device though its mesh could share it, by name.

A lost constraint changes no number and raises nothing; it only makes every device hold and compute what it need not.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from gptjax.config import TrainConfig
from gptjax.parallel.sharding import AXES, WHOLE_IF_UNEVEN, suffix

# A parameter is big where it is so large a share of what a device holds of all; smaller ones (norms, biases) stay whole
# on purpose, for gathering them would cost more.
BIG = 0.05

_LINE = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?:f32|bf16|f16)\[([\d,]+)\].*?op_name=\"([^\"]*)\"", re.MULTILINE)


def findings(config: TrainConfig, sizes: Mapping[str, int], state: Any, batch: Any, program: str) -> list[str]:
    """One line for each fault of a step: `state` and `batch` are trees of shapes with shardings, `program` is HLO.

    The program is that of one device, after XLA has partitioned it: compiled.as_text().
    """
    found = [*replicated_parameters(state.params, sizes), *unused_axes((state.params, batch), sizes)]
    return [*found, *whole_heads(state.params, sizes), *replicated_activations(config, sizes, program)]


def replicated_parameters(params: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Large parameters that every device holds whole, where the mesh has axes to share them."""
    shared = sizes["fsdp"] * sizes["tensor"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for _, x in leaves)
    for path, x in leaves:
        size = math.prod(x.shape) * x.dtype.itemsize
        if shared > 1 and size > BIG * held and x.sharding.is_fully_replicated:
            yield (
                f"parameter {path[-1].key}, {size / 2**20:,.1f} MiB, is whole on each of the {shared} devices that "
                f"could share it"
            )


def unused_axes(trees: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Axes of the mesh over which neither a parameter nor the batch lies: their devices all do the same."""
    used: set[str] = set()
    for x in jax.tree.leaves(trees):
        for entry in x.sharding.spec:
            used |= {entry} if isinstance(entry, str) else set(entry or ())
    for axis in AXES:
        if sizes[axis] > 1 and axis not in used:
            yield f"mesh.{axis}={sizes[axis]} is not used: nothing lies over it, its devices all compute the same"


def whole_heads(params: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """Heads that do not divide over mesh.tensor, so that every device holds and computes all of them."""
    told: set[str] = set()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        for letter, size in zip(suffix(path[-1].key), x.shape):
            if letter in WHOLE_IF_UNEVEN and size % sizes["tensor"] and letter not in told:
                told.add(letter)
                kind = {"H": "query heads", "G": "key-value heads"}[letter]
                yield (
                    f"{path[-1].key}: {size} {kind} do not divide over mesh.tensor={sizes['tensor']}; every device "
                    f"holds all of them"
                )


def replicated_activations(config: TrainConfig, sizes: Mapping[str, int], program: str) -> Iterator[str]:
    """Activations that hold the rows of all devices at their full width, each operation once, the largest first.

    It goes by rows alone: places that the context axis should share, and does not, are not told.
    """
    shards = sizes["data"] * sizes["fsdp"]
    rows = config.data.batch_size // config.optim.accumulate
    length = config.data.length // sizes["context"]
    if shards == 1:
        return
    worst: dict[str, tuple[int, str]] = {}
    for shape, name in _LINE.findall(program):
        dims = tuple(map(int, shape.split(",")))
        # Rows that are all there while the width is split were only sent another way.
        rest = _beside(dims, rows, length)
        if rest >= config.model.width and math.prod(dims) > worst.get(name, (0, ""))[0]:
            worst[name] = math.prod(dims), shape
    for name, (_, shape) in sorted(worst.items(), key=lambda kv: -kv[1][0]):
        yield f"activation [{shape}] of {_short(name)} holds all {rows} rows on every device, not {rows // shards}"


def _beside(dims: tuple[int, ...], rows: int, length: int) -> int:
    """The product of the dimensions beside those of all rows and their length; 0 where these are not there."""
    for i in range(len(dims)):
        if dims[i : i + 2] == (rows, length):
            return math.prod(dims[:i] + dims[i + 2 :])
        if dims[i] == rows * length and rows > 1:
            return math.prod(dims[:i] + dims[i + 1 :])
    return 0


def _short(name: str) -> str:
    """The part of an operation's name that says where in the model it is: the equation of a product, or the last."""
    parts = [part for part in name.split("/") if part not in ("while", "body", "closed_call", "eval_jaxpr")]
    equation = next((part for part in reversed(parts) if "->" in part), "")
    return equation or "/".join(parts[-2:])

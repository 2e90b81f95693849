"""One alphabet: the letters that end a tensor's name are its dimensions and, through RULES, its sharding.

    B batch (rows)          L query length        M key length          T position table
    D model width           F MLP width           V vocabulary          N layers (stacked)
    H query heads           G key-value heads     J query heads that share a key-value head (H = G J)
    K head size             C positions of one chunk of the loss                    W words of a random key
    R rank of LoRA          S answers of one prompt
    I images                P patches of an image         Y numbers of a patch    U numbers of patches that are merged
    X hidden size between the encoder of images and the decoder

`q_NDHK` is the stack of query projections; `inputs_BL` is a batch of token ids. The same names shard parameters,
optimizer state, batches, activations and caches.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from gptjax.config import MeshConfig
from gptjax.config.section import InputError

P = jax.P

AXES = ("data", "fsdp", "tensor", "context")

# Letter -> mesh axes. Letters are read left to right, and each axis is used once per array: in x_BLD the batch takes
# fsdp, so D stays whole; in w_in_DF it is D that takes fsdp. Letters without an entry are never sharded.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"), "L": ("context",), "D": ("fsdp",),
    "F": ("tensor",), "H": ("tensor",), "G": ("tensor",), "V": ("tensor",),
}  # fmt: skip

# Heads that do not divide over the tensor axis stay whole on every device; any other parameter must divide.
WHOLE_IF_UNEVEN = "HG"


def suffix(name: str) -> str:
    """The dimension letters at the end of a name: 'DHK' for 'q_DHK', '' for 'step'."""
    letters = name.rsplit("_", 1)[-1]
    return letters if "_" in name and letters.isalpha() and letters.isupper() else ""


def matrix(name: str) -> tuple[str, str] | None:
    """The two sides of a matrix, or a stack of them: ('D', 'HK') for 'q_NDHK'; None for other parameters.

    Leading N and E are stacks, and K belongs to the heads before it. Matrices of the layers are named inputs first.
    """
    sides = re.findall("[HG]K|.", suffix(name).lstrip("NE"))
    return (sides[0], sides[1]) if len(sides) == 2 else None


def spec(letters: str) -> jax.sharding.PartitionSpec:
    """The partition of an array with these dimensions on a mesh of AXES.

    An array with one letter besides N stays whole unless it is B: norm scales and biases are not worth gathering.
    """
    if len(letters.replace("N", "")) == 1 and "B" not in letters:
        return P(*(None for _ in letters))
    used: set[str] = set()
    entries = []
    for letter in letters:
        axes = tuple(a for a in RULES.get(letter, ()) if a not in used)
        used.update(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*entries)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of those given, with -1 filled in, laid out for the network.

    Raises InputError where the sizes do not cover the devices, or the devices do not form cfg.slices slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(cfg.covering(len(devices)).values())
    # Auto: XLA propagates shardings from our constraints.
    return Mesh(_device_grid(sizes, cfg.slices, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_slices(devices: Sequence[Any]) -> int:
    """Number of slices that devices form; several TPU slices are joined by a slower network."""
    return len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1


def _device_grid(sizes: list[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices in the shape of the mesh, so that neighbours along an axis are near in the network.

    Each of several slices holds one part of the data axis and all of every other axis. Where an axis of the mesh does
    not take whole dimensions of a TPU's torus (data=2 and fsdp=8 on 4x4), a dimension is split for two axes.
    """
    counts = {unit: len({getattr(d, unit, None) for d in devices}) for unit in ("slice_index", "process_index")}
    if slices == 1:
        if (actual := num_slices(devices)) > 1:
            raise InputError(
                f"mesh.slices=1, but the devices form {actual} slices, between which the network is slow; "
                f"set --mesh.slices {actual}, and the data axis is cut over them"
            )
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if slices not in counts.values():
        raise InputError(
            f"mesh.slices={slices}, but the {len(devices)} device(s) form {counts['slice_index']} slice(s) and belong "
            f"to {counts['process_index']} process(es); set --mesh.slices to one of these numbers"
        )
    unit = "slice_index" if counts["slice_index"] == slices else "process_index"
    by_slice = Counter(getattr(d, unit) for d in devices)
    if sizes[0] % slices or len(set(by_slice.values())) > 1:
        raise InputError(
            f"mesh.slices={slices} slices of {', '.join(map(str, sorted(by_slice.values())))} devices do not each hold "
            f"an equal part of mesh.data={sizes[0]} and all of the other axes; make mesh.data a multiple of "
            f"{slices}, and the product of the others a divisor of the devices of a slice"
        )
    inside = [sizes[0] // slices, *sizes[1:]]
    return mesh_utils.create_hybrid_device_mesh(
        inside, [slices] + [1] * (len(sizes) - 1), devices, process_is_granule=unit == "process_index",
        allow_split_physical_axes=True,
    )  # fmt: skip


def _parts(entry: Any, mesh: Any) -> int:
    """The number of shards that the mesh axes of an entry cut a dimension into."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[a] for a in axes)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Constrains the sharding of an activation with these dimensions; does nothing where no mesh is set.

    A dimension that its axes do not divide (the single row of a chat) stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries = [e if n % _parts(e, mesh) == 0 else None for e, n in zip(spec(letters), x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*entries))


def constrain_tree(tree: Any) -> Any:
    """Constrains the sharding of each array as its name in the tree says: so all programs agree on where it lies."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, suffix(path[-1].key)), tree)


def sharding_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of the array with this name and shape; raises InputError where a dimension does not divide."""
    letters = suffix(name)
    if not letters and shape == ():
        return NamedSharding(mesh, P())
    assert len(letters) == len(shape), f"{name} has shape {shape}: its name must end with one letter a dimension"
    entries = []
    for letter, entry, size in zip(letters, spec(letters), shape, strict=True):
        divides = size % _parts(entry, mesh) == 0
        if not divides and letter not in WHOLE_IF_UNEVEN:
            raise InputError(
                f"dimension {letter}={size} of {name} does not divide over {_parts(entry, mesh)} devices ({entry}); "
                f"choose mesh sizes that divide it"
            )
        entries.append(entry if divides else None)
    return NamedSharding(mesh, P(*entries))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf of a tree of arrays (or their shapes), by the last name on its path.

    Optimizer state repeats the parameters' names, so its leaves are sharded as their parameters are.
    """

    def one(path, leaf):
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", ""))) if leaf.shape else ""
        return sharding_of(name, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(shapes: Any, mesh: Mesh) -> Any:
    """Shapes, types and shardings of a tree of shapes, with nothing allocated; the target of a restore."""

    def one(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings(shapes, mesh))


class LocalRows(NamedTuple):
    """The rows of a batch of `total` that the devices of this process hold, by ascending number."""

    numbers: np.ndarray
    total: int


def local_rows(total: int, mesh: Mesh) -> LocalRows:
    """The rows of a batch that this process provides; processes that share rows provide the same ones."""
    indices = sharding_of("rows_B", (total,), mesh).addressable_devices_indices_map((total,))
    return LocalRows(np.unique(np.concatenate([np.arange(total)[index] for index in indices.values()])), total)


def to_global(tree: Any, mesh: Mesh, rows: LocalRows | None = None) -> Any:
    """Places a tree of host arrays on the mesh; each process provides the shards of its devices.

    The arrays are whole, or with `rows` hold only those rows along their first dimension.
    """

    def shape(x: Any) -> tuple[int, ...]:
        return x.shape if rows is None else (rows.total, *x.shape[1:])

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        def part(index: Any) -> Any:
            if rows is None:
                return x[index]
            first, stop, _ = index[0].indices(rows.total)
            at = int(np.searchsorted(rows.numbers, first))
            return x[slice(at, at + stop - first), *index[1:]]

        return jax.make_array_from_callback(shape(x), sharding, part)

    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x), x.dtype), tree)
    return jax.tree.map(place, tree, shardings(whole, mesh))


def on_host(tree: Any) -> Any:
    """Copies a tree of arrays whole to the host, in every process: gathered where others hold parts of one."""

    def one(x: jax.Array) -> np.ndarray:
        local = x.is_fully_addressable or x.is_fully_replicated
        # A copy: on a CPU asarray shows the device's own memory, which may be given away to the next call.
        return np.array(x if local else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)


def require_mesh(tree: Any) -> None:
    """Raises InputError where arrays lie on several devices and no mesh is set.

    Without a mesh `constrain` does nothing, and XLA would silently replicate every activation.
    """
    distributed = any(len(x.devices()) > 1 for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    if distributed and jax.sharding.get_abstract_mesh().empty:
        raise InputError("arrays lie on several devices but no mesh is set; call this under `with jax.set_mesh(mesh):`")


def axes_of(sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """The mesh axes that shard the dimension of each letter; letters whose size they do not divide are left out.

    Empty without a mesh, and inside a shard_map, whose arrays are one device's already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return {}
    over = {x: tuple(a for a in RULES.get(x, ()) if mesh.shape[a] > 1) for x in sizes}
    return {x: axes for x, axes in over.items() if axes and sizes[x] % _parts(axes, mesh) == 0}


def num_shards(length: int) -> int:
    """Number of devices that share a row of this length in zigzag order; 1: rows keep their order.

    So it is without a mesh, inside a shard_map over all axes, and for a length that 2n does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return 1
    n = dict(mesh.shape).get("context", 1)
    return n if length % (2 * n) == 0 else 1


def on_each_device(function: Callable, axes: dict[str, tuple[str, ...]], inputs: tuple, outputs: Any) -> Callable:
    """Wraps a function of one device's shards with shard_map; `axes` are the mesh axes of each letter (see axes_of).

    `inputs` and `outputs` are trees of letters such as "BLHK", shaped as the arguments and the result.
    """
    if not axes:
        return function

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda letters: P(*(axes.get(x) for x in letters)), tree)

    # Unchecked: through loops of data-dependent length jax can't see which results are replicated.
    return jax.shard_map(function, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)

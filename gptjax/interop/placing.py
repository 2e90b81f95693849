"""The parameters of a decoder, from the tensors of a file straight onto a mesh: one tensor at a time on the host.

A stacked leaf is made on the devices and filled there layer by layer, each device with its own part. So no process
holds the model a second time, and no device more than its share of it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptjax.config.section import InputError
from gptjax.interop.families import VISION, ModelFamily
from gptjax.interop.layout import TensorSource, leaf_sizes, read_slice, stacked_leaves, stored_tensor, top_leaves
from gptjax.model.decoder import Decoder
from gptjax.parallel.sharding import sharding_of, suffix

P = jax.P

# Constants that older versions of transformers saved beside the weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class CheckedSource(TensorSource, Protocol):
    """Tensors whose types and shapes are known before their numbers are read; `path` is that of the file or folder."""

    path: Any

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InputError unless the tensor is there, of a type that is read, and of this shape."""
        ...


def place(tensors: CheckedSource, family: ModelFamily, decoder: Decoder, mesh: Mesh) -> dict[str, Any]:
    """Every parameter that the decoder declares, as float32 on the mesh, the vocabulary padded with zeros.

    All names, types and shapes are checked before the first number is read. Raises InputError for tensors that are
    missing, left over, or of another type or shape, and for weights that are not finite.
    """
    _check(tensors, family, decoder)

    def read(leaf: str, n: int | None = None) -> np.ndarray:
        x = read_slice(tensors, family, decoder, leaf, n)
        if not np.isfinite(x).all():
            name, _ = stored_tensor(tensors, family, decoder, leaf, n)
            raise InputError(f"{tensors.path}: tensor {name} holds weights that are not finite; download it again")
        return x

    def whole(leaf: str) -> jax.Array:
        x = read(leaf)
        if leaf == "embed_VD" and decoder.cfg.tied and family.head in tensors.names:
            _check_tied(tensors, family.head, x[: decoder.vocab_size])
        return _put(x, sharding_of(leaf, x.shape, mesh))

    def stacked(leaf: str) -> jax.Array:
        size = leaf_sizes(decoder, leaf)
        shape = tuple(size[letter] for letter in suffix(leaf))
        sharding = sharding_of(leaf, shape, mesh)
        of_layer = NamedSharding(mesh, P(*sharding.spec[1:]))
        fill = _filling(sharding)
        x = jnp.zeros(shape, jnp.float32, device=sharding)
        for n in range(shape[0]):
            x = fill(x, _put(read(leaf, n), of_layer), np.int32(n))
        return x

    # The large leaves first, while there is little else in memory.
    params: dict[str, Any] = {leaf: whole(leaf) for leaf in sorted(top_leaves(decoder.cfg), key=suffix, reverse=True)}
    layers = {leaf: stacked(leaf) for leaf in stacked_leaves(decoder.cfg)}
    tree = _own(params, "") | {"layers": _own(layers, "")}
    seeing = _own(params, VISION)
    return tree | ({"vision": seeing | {"layers": _own(layers, VISION)}} if seeing else {})


def _own(leaves: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The leaves of the encoder (`VISION`), or of the decoder, under their own names."""
    return {n.removeprefix(VISION): x for n, x in leaves.items() if n.startswith(VISION) == (prefix == VISION)}


def _put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The array on its devices, of which this process copies its own parts; the host's memory is free afterwards."""
    # Not make_array_from_callback, which keeps the whole until Python collects its garbage.
    parts = sharding.addressable_devices_indices_map(x.shape).items()
    arrays = jax.block_until_ready([jax.device_put(x[index], device) for device, index in parts])
    return jax.make_array_from_single_device_arrays(x.shape, sharding, arrays)


@functools.cache
def _filling(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    """The function that puts layer n into a stack, whose memory it takes over."""

    def fill(stack: jax.Array, layer: jax.Array, n: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, n, 0)

    return jax.jit(fill, out_shardings=sharding, donate_argnums=0)


def _check(tensors: CheckedSource, family: ModelFamily, decoder: Decoder) -> None:
    left = set(tensors.names)
    stacks = stacked_leaves(decoder.cfg)
    tops = [(leaf, None) for leaf in top_leaves(decoder.cfg)]
    layers = ((leaf, n) for n in range(max(stacks.values())) for leaf, count in stacks.items() if n < count)
    for leaf, n in itertools.chain(tops, layers):  # a model of too many layers ends at the first that is missing
        name, shape = stored_tensor(tensors, family, decoder, leaf, n)
        tensors.check(name, shape)
        left.discard(name)
    if decoder.cfg.tied:
        left.discard(family.head)
    if left := sorted(n for n in left if not n.endswith(CONSTANTS) and not family.is_idle(n, decoder.cfg)):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        plain = f"wanted a plain {family.model_type} model"
        raise InputError(f"{tensors.path}: no place for tensor {', '.join(left[:3])}{more}; {plain}")


def _check_tied(tensors: CheckedSource, head: str, embed_VD: np.ndarray) -> None:
    """Raises InputError where a file repeats the tied head, and it is another."""
    if not np.array_equal(tensors.take(head, embed_VD.shape), embed_VD):
        raise InputError(f"{tensors.path}: tie_word_embeddings is true, but {head} differs from the embedding")

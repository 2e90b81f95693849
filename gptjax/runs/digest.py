"""Array digests that are the same on any mesh."""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

P = jax.P

LARGE, MOST_BLOCKS = 4 * 2**20, 32


def named_leaves(tree: Any) -> dict[str, Any]:
    """Each leaf by its dotted name, in the order of jax.tree.leaves: 'params.layers.q_NDHK', 'opt_state.0.count'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def digests(tree: Any) -> dict[str, int]:
    """A 32-bit digest of each leaf by its dotted name. A leaf with one bit changed always has another digest.

    The bits of each element (as one or two uint32) and its place in the array are mixed into a number, and these are
    summed modulo 2^32; so neither the order of the sum nor the layout over devices matters, and exchanging two
    elements is seen but for a chance of 2^-32.
    """
    return {name: int(np.asarray(_compiled(*_layout(leaf))(leaf))) for name, leaf in named_leaves(tree).items()}


def tree_sha256(tree: Any) -> str:
    """A SHA-256 of the digests of all leaves, in hex."""
    return hashlib.sha256(json.dumps(digests(tree), sort_keys=True).encode()).hexdigest()


def _layout(leaf: Any) -> tuple[NamedSharding | None, int]:
    """The sharding of a leaf's digest, and the number of blocks in which its first dimension is read.

    Several processes can each read the digest only if every device has it. Large leaves are read in blocks because XLA
    on a CPU keeps the mixed numbers in memory before it sums them; a dimension that is cut over devices stays whole.
    """
    sharding, shape, blocks = getattr(leaf, "sharding", None), np.shape(leaf), 1
    if getattr(leaf, "nbytes", 0) >= LARGE and (sharding is None or sharding.shard_shape(shape)[0] == shape[0]):
        blocks = max(n for n in range(1, MOST_BLOCKS + 1) if shape[0] % n == 0)
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None, blocks


@functools.cache
def _compiled(out_sharding: NamedSharding | None, blocks: int):
    return jax.jit(functools.partial(_digest, blocks=blocks), out_shardings=out_sharding)


def _digest(x: jax.Array, blocks: int) -> jax.Array:
    x = jnp.asarray(x)
    if blocks == 1:
        return _sum_mixed(_bits(x), 0)
    rows = x.shape[0] // blocks

    def add(n: jax.Array, total: jax.Array) -> jax.Array:
        bits = _bits(jax.lax.dynamic_slice_in_dim(x, n * rows, rows))
        return total + _sum_mixed(bits, n.astype(jnp.uint32) * jnp.uint32(bits.size % 2**32))

    return jax.lax.fori_loop(0, blocks, add, jnp.uint32(0))


def _sum_mixed(bits: jax.Array, first: jax.Array | int) -> jax.Array:
    """The sum of these elements, each mixed with its place in the array; that of the first is `first`."""
    # An index made of one term a dimension, since flattening a sharded array would gather it.
    place, stride = jnp.uint32(1) + first, 1
    for dim in reversed(range(bits.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    # The finaliser of MurmurHash3: each line maps the 32-bit numbers one to one, so that no change of bits is lost.
    h = bits ^ (place * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The elements as uint32: narrow types widened, 64-bit ones split in two along a new last dimension."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize * 8, 32)
    assert x.dtype.kind != "c", "complex arrays have no digest"
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)

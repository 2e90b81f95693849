"""The balanced order in which the devices of the context axis share a row, and the moves into it and back.

With n shards a row is cut in 2n equal chunks, and shard i holds chunks i and 2n - 1 - i. A query sees what lies before
it, so the shard with the end of a row would have the work of many first ones; with an early and a late chunk each has
the same (Llama 3, Dubey et al. 2024, section 3.3.2: this order, and keys and values gathered whole).

Between the embedding and the last layer rows are in this order. Outside, in batches, losses and logits, they are as
they were written: the moves are two sends of half a shard each, and beside attention nothing knows of them.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

P = jax.P

AXIS = "context"


def num_shards(length: int) -> int:
    """How many devices share rows of this length in zigzag order; 1: rows keep their order.

    So it is without a mesh, inside a shard_map over all axes, and for a length that 2n does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return 1
    n = dict(mesh.shape).get(AXIS, 1)
    return n if length % (2 * n) == 0 else 1


def places(length: int, n: int) -> jax.Array:
    """place_L: where in the row as it was written each place of the zigzag order of n shards comes from."""
    place_L = jnp.arange(length, dtype=jnp.int32)
    if n == 1:
        return place_L
    size = length // (2 * n)
    shard_L, late_L = place_L // (2 * size), place_L // size % 2
    return jnp.where(late_L, 2 * n - 1 - shard_L, shard_L) * size + place_L % size


def to_zigzag(x_BL: jax.Array, n: int) -> jax.Array:
    """x_BL, or x_BLD, over n context shards from the order it was written in to the zigzag order."""
    return x_BL if n == 1 else _on_shards(_send, x_BL, n)


def from_zigzag(x_BL: jax.Array, n: int) -> jax.Array:
    """The inverse of `to_zigzag`."""
    return x_BL if n == 1 else _on_shards(_send_back, x_BL, n)


def gather_length(x_BL: jax.Array, axes: tuple[str, ...], n: int) -> jax.Array:
    """Inside a shard_map: all of the rows of which each device of these axes has a part, in the order as written.

    n = 1 says that the parts are not in zigzag order.
    """
    x_BM = jax.lax.all_gather(x_BL, axes, axis=1, tiled=True)
    if n == 1:
        return x_BM
    chunks = x_BM.reshape(x_BM.shape[0], n, 2, -1, *x_BM.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x_BM.shape)


def part_of_sum(x_BM: jax.Array, axes: tuple[str, ...], n: int) -> jax.Array:
    """The transpose of `gather_length`: the sum over the devices of whole rows, of which each gets its own part."""
    if n > 1:
        chunks = x_BM.reshape(x_BM.shape[0], 2 * n, -1, *x_BM.shape[2:])
        x_BM = jnp.stack([chunks[:, :n], chunks[:, : n - 1 : -1]], axis=2).reshape(x_BM.shape)
    return jax.lax.psum_scatter(x_BM, axes, scatter_dimension=1, tiled=True)


def _on_shards(function, x_BL, n):
    # Over the context axis alone: rows and heads stay with the compiler, whatever their sharding is.
    move = jax.shard_map(lambda x: function(x, n), in_specs=P(None, AXIS), out_specs=P(None, AXIS), axis_names={AXIS})
    return move(x_BL)


def _routes(n):
    """Who sends its even, and who its odd chunk to whom: as written, device j holds chunks 2j and 2j + 1.

    Chunks c and 2n - 1 - c are never both even: in either order each device holds one even chunk and one odd.
    """
    return [[(j, min(c, 2 * n - 1 - c)) for j, c in enumerate(range(odd, 2 * n, 2))] for odd in (0, 1)]


def _send(x_BL, n):
    even, odd = (jax.lax.ppermute(x, AXIS, r) for x, r in zip(jnp.split(x_BL, 2, axis=1), _routes(n), strict=True))
    return jnp.concatenate(_turned(even, odd), axis=1)


def _send_back(x_BL, n):
    parts = zip(_turned(*jnp.split(x_BL, 2, axis=1)), _routes(n), strict=True)
    return jnp.concatenate([jax.lax.ppermute(x, AXIS, [(b, a) for a, b in r]) for x, r in parts], axis=1)


def _turned(first, second):
    """The two in this order on devices of even number, whose early chunk is even, and turned round on the others."""
    straight = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(straight, first, second), jnp.where(straight, second, first)

"""Context parallelism: the zigzag order of a row over the context axis, and the moves into it and back.

With n shards a row is cut into 2n equal chunks, and shard i holds chunks i and 2n - 1 - i. Causal attention costs more
for later queries; with an early and a late chunk every shard has the same work (Llama 3, Dubey et al. 2024, section
3.3.2, which also gathers keys and values whole).

Rows are in zigzag order between the embedding and the last layer, and in their own order in batches, losses and logits.
A move is two sends of half a shard each; only attention depends on the order.
"""

import jax
import jax.numpy as jnp

P = jax.P

AXIS = "context"


def places(length: int, n: int) -> jax.Array:
    """place_L: the position in the row of each position of the zigzag order of n shards."""
    place_L = jnp.arange(length, dtype=jnp.int32)
    size = length // (2 * n)
    shard_L, late_L = place_L // (2 * size), place_L // size % 2
    return jnp.where(late_L, 2 * n - 1 - shard_L, shard_L) * size + place_L % size


def to_zigzag(x_BL: jax.Array, n: int) -> jax.Array:
    """Moves x_BL, or x_BLD, over n context shards from its own order to the zigzag order."""
    return _on_shards(_send, x_BL, n)


def from_zigzag(x_BL: jax.Array, n: int) -> jax.Array:
    """The inverse of `to_zigzag`."""
    return _on_shards(_send_back, x_BL, n)


def gather_length(x_BL: jax.Array, axes: tuple[str, ...], n: int) -> jax.Array:
    """Gathers whole rows from the shards of these axes, in their own order; called inside a shard_map.

    n = 1: the shards are not in zigzag order.
    """
    x_BM = jax.lax.all_gather(x_BL, axes, axis=1, tiled=True)
    if n == 1:
        return x_BM
    chunks = x_BM.reshape(x_BM.shape[0], n, 2, -1, *x_BM.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x_BM.shape)


def part_of_sum(x_BM: jax.Array, axes: tuple[str, ...], n: int) -> jax.Array:
    """The transpose of `gather_length`: sums whole rows over the devices and returns each one's shard."""
    if n > 1:
        chunks = x_BM.reshape(x_BM.shape[0], 2 * n, -1, *x_BM.shape[2:])
        x_BM = jnp.stack([chunks[:, :n], chunks[:, : n - 1 : -1]], axis=2).reshape(x_BM.shape)
    return jax.lax.psum_scatter(x_BM, axes, scatter_dimension=1, tiled=True)


def _on_shards(function, x_BL, n):
    # Over the context axis alone: rows and heads stay with the compiler, whatever their sharding is.
    move = jax.shard_map(lambda x: function(x, n), in_specs=P(None, AXIS), out_specs=P(None, AXIS), axis_names={AXIS})
    return move(x_BL)


def _routes(n):
    """The (sender, receiver) pairs of even chunks, and of odd ones; in a row's own order device j holds 2j and 2j + 1.

    Chunks c and 2n - 1 - c are never both even, so in either order each device holds one even and one odd chunk.
    """
    return [[(j, min(c, 2 * n - 1 - c)) for j, c in enumerate(range(odd, 2 * n, 2))] for odd in (0, 1)]


def _send(x_BL, n):
    even, odd = (jax.lax.ppermute(x, AXIS, r) for x, r in zip(jnp.split(x_BL, 2, axis=1), _routes(n), strict=True))
    return jnp.concatenate(_swap_on_odd(even, odd), axis=1)


def _send_back(x_BL, n):
    parts = zip(_swap_on_odd(*jnp.split(x_BL, 2, axis=1)), _routes(n), strict=True)
    return jnp.concatenate([jax.lax.ppermute(x, AXIS, [(b, a) for a, b in r]) for x, r in parts], axis=1)


def _swap_on_odd(first, second):
    """The two in this order on devices of even number, whose early chunk is even, and swapped on the others."""
    even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(even, first, second), jnp.where(even, second, first)

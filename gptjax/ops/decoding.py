"""Decoding's own operations: the type that it multiplies in, products of few rows, and writes into a cache."""

import functools
import math

import jax
import jax.numpy as jnp

from gptjax.ops.device import device
from gptjax.runtime.process import usable_cores


def decode_dtype(dtype: str) -> str:
    """The type in which a model decodes: its own; on a CPU, which reads bfloat16 at a tenth of its speed, float32."""
    return "float32" if device().platform == "cpu" else dtype


MANY_ROWS = 8  # from here on XLA's own product is as fast


def few_rows_einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(equation, x, w) of "batch inputs, inputs outputs -> batch outputs" for a few rows of x.

    Its time is that of reading the weight. XLA on a CPU computes the product of one row on one core (jax 0.12). Cut
    along the inputs into one product a core, whose results are added up, it reads as fast as the memory gives it.
    """
    weight, result = equation.split(",")[1].split("->")
    num_inputs = sum(letter not in result for letter in weight)
    batch, inputs = x.shape[: x.ndim - num_inputs], x.shape[x.ndim - num_inputs :]
    rows, size = math.prod(batch), math.prod(inputs)
    parts = math.gcd(size, 1 << (usable_cores().bit_length() - 1))  # a power of two, to divide the sizes of a model
    if parts == 1 or x.dtype != jnp.float32 or device().platform != "cpu":
        return jnp.einsum(equation, x, w)
    x_PRC = jnp.moveaxis(x.reshape(rows, parts, size // parts), 1, 0)
    y_PRO = jnp.einsum("PRC,PCO->PRO", x_PRC, w.reshape(parts, size // parts, -1))
    return y_PRO.sum(0).reshape(*batch, *w.shape[num_inputs:])


def write_slots(cache_BGMK: jax.Array, new_BGLK: jax.Array, start_B: jax.Array) -> jax.Array:
    """The cache with each row's new_BGLK in its slots start .. start + L - 1."""
    new_BGLK = new_BGLK.astype(cache_BGMK.dtype)
    if len(start_B) > 1:
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return jax.vmap(put)(cache_BGMK, new_BGLK, start_B)
    return _written_once(cache_BGMK, new_BGLK, (0, 0, start_B[0], 0))


def write_served(cache_SGMK: jax.Array, new_BGLK: jax.Array, first: jax.Array, start_B: jax.Array) -> jax.Array:
    """`write_slots` for the rows first .. first + B - 1 of a server's cache: a token each, or several of one row."""
    new_BGLK = new_BGLK.astype(cache_SGMK.dtype)
    B, G, L, _ = new_BGLK.shape
    if B > 1:
        assert L == 1, "rows go on by a token each"
        return cache_SGMK.at[first + jnp.arange(B), :, start_B].set(new_BGLK[:, :, 0])
    return _written_once(cache_SGMK, new_BGLK, (first, 0, start_B[0], 0))


def _written_once(cache: jax.Array, new: jax.Array, start: tuple[jax.typing.ArrayLike, ...]) -> jax.Array:
    """dynamic_update_slice, in place.

    XLA on a CPU fuses the write of one row into every reader and then copies the whole cache to keep the old one for
    them; a loop that runs once, as the compiler can't know, is what it does not look through.
    """

    def row(_, cache):
        return jax.lax.dynamic_update_slice(cache, new, start)

    if device().platform != "cpu":
        return row(0, cache)
    once = sum(jnp.asarray(place) for place in start) >= 0
    return jax.lax.fori_loop(0, jnp.asarray(once, jnp.int32), row, cache)

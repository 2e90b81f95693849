"""Decoding's own operations: the type that it multiplies in, and the writing of new tokens into a cache."""

import functools

import jax
import jax.numpy as jnp

from gptjax.ops.device import device


def decode_dtype(dtype: str) -> str:
    """The type in which a model decodes: its own; on a CPU, which reads bfloat16 at a tenth of its speed, float32."""
    return "float32" if device().platform == "cpu" else dtype


def write_slots(cache_BGMK: jax.Array, new_BGLK: jax.Array, start_B: jax.Array) -> jax.Array:
    """The cache with each row's new_BGLK in its slots start .. start + L - 1."""
    new_BGLK = new_BGLK.astype(cache_BGMK.dtype)
    if len(start_B) > 1:
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return jax.vmap(put)(cache_BGMK, new_BGLK, start_B)
    start = start_B[0]

    def row(_, cache_BGMK):
        return jax.lax.dynamic_update_slice_in_dim(cache_BGMK, new_BGLK, start, axis=2)

    if device().platform != "cpu":
        return row(0, cache_BGMK)
    # XLA on a CPU fuses the write of one row into every reader and then copies the whole cache to keep the old one for
    # them; a loop that runs once, as the compiler can't know, is what it does not look through.
    return jax.lax.fori_loop(0, (start >= 0).astype(jnp.int32), row, cache_BGMK)

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


def attend_served(
    q_BLHK: jax.Array,
    k_SGMK: jax.Array,
    v_SGMK: jax.Array,
    query_BL: jax.Array,
    first: jax.Array,
    blocks: jax.Array,
    *,
    block: int,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """out_BLHK of reference.attend, of queries at the places query_BL of the rows first .. first + B - 1 of a cache.

    Only the first `blocks` blocks of `block` keys are read, by an online softmax (Milakov & Gimelshein 2018). A block
    in which a row sees nothing leaves that row's numbers as they are, to the bit: so how far other rows have come, and
    how long a cache is, changes none of them.
    """
    B, L, H, K = q_BLHK.shape
    G = k_SGMK.shape[1]
    q_BGJLK = jnp.moveaxis(q_BLHK.reshape(B, L, G, H // G, K) * scale, 1, 3)

    def read(c, carry):
        top_BGJL, sum_BGJL, acc_BGJLK = carry
        k_BGMK, v_BGMK = (
            jax.lax.dynamic_slice(x, (first, 0, c * block, 0), (B, G, block, K)).astype(q_BLHK.dtype)
            for x in (k_SGMK, v_SGMK)
        )
        s_BGJLM = jnp.einsum("BGJLK,BGMK->BGJLM", q_BGJLK, k_BGMK).astype(jnp.float32)
        if softcap:
            s_BGJLM = softcap * jnp.tanh(s_BGJLM / softcap)
        behind_BLM = query_BL[:, :, None] - (c * block + jnp.arange(block))
        seen_BLM = behind_BLM >= 0 if window is None else (behind_BLM >= 0) & (behind_BLM < window)
        s_BGJLM = jnp.where(seen_BLM[:, None, None], s_BGJLM, -jnp.inf)
        new_BGJL = jnp.maximum(top_BGJL, s_BGJLM.max(axis=-1))
        p_BGJLM, fade_BGJL = jnp.exp(s_BGJLM - new_BGJL[..., None]), jnp.exp(top_BGJL - new_BGJL)
        out_BGJLK = jnp.einsum("BGJLM,BGMK->BGJLK", p_BGJLM.astype(v_BGMK.dtype), v_BGMK)
        sum_BGJL = sum_BGJL * fade_BGJL + p_BGJLM.sum(axis=-1)
        return new_BGJL, sum_BGJL, acc_BGJLK * fade_BGJL[..., None] + out_BGJLK.astype(jnp.float32)

    none_BGJL = jnp.zeros((B, G, H // G, L), jnp.float32)
    # A finite start: where nothing was seen yet, -inf less -inf would be no number.
    start = (none_BGJL + jnp.finfo(jnp.float32).min, none_BGJL, jnp.zeros((B, G, H // G, L, K), jnp.float32))
    _, sum_BGJL, acc_BGJLK = jax.lax.fori_loop(0, blocks, read, start)
    out_BGJLK = acc_BGJLK / jnp.where(sum_BGJL > 0, sum_BGJL, 1.0)[..., None]
    return jnp.moveaxis(out_BGJLK, 3, 1).reshape(B, L, H, K).astype(q_BLHK.dtype)

"""Attention as pure functions: masks, rotary positions, and the plain reference that a faster path must equal."""

import jax
import jax.numpy as jnp


def causal_mask(segments_BL: jax.Array) -> jax.Array:
    """mask_BLM of a training row: position l sees m where m <= l and both lie in the same document.

    Padding is segment 0. It sees only itself and other padding, so that no softmax is empty.
    """
    index_L = jnp.arange(segments_BL.shape[1])
    return (index_L[:, None] >= index_L[None, :]) & (segments_BL[:, :, None] == segments_BL[:, None, :])


def cache_mask(positions_BL: jax.Array, slots: int) -> jax.Array:
    """mask_BLM of cached decoding: the token at position p sees the slots 0..p, which is all that was written."""
    return jnp.arange(slots)[None, None, :] <= positions_BL[:, :, None]


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: turns the pair (x_i, x_{i + K/2}) by the angle p theta^(-2i/K), in queries and keys alike.

    Su et al. 2021, RoFormer, in the half-split form of the Llama checkpoints. Computed in float32: in bfloat16 the
    angle of position 257 is already that of 256.
    """
    half = x_BLHK.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with chance `rate` and scales the rest to keep the mean; no key means no dropout."""
    if rate == 0.0 or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def attend(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask_BLM: jax.Array,
    *,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """out_BLHK = softmax(q k^T / sqrt(K)) v over the positions that the mask allows; the softmax is float32.

    Vaswani et al. 2017, with grouped queries (Ainslie et al. 2023): query head h uses key-value head h // J.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BMGK.shape[2]
    # Heads go before positions, so that both products are plain batched matrices: on a CPU twice as fast.
    q_BGJLK = jnp.moveaxis(q_BLHK.reshape(B, L, G, H // G, K) * K**-0.5, 1, 3)
    k_BGMK, v_BGMK = jnp.moveaxis(k_BMGK, 1, 2), jnp.moveaxis(v_BMGK, 1, 2)
    s_BGJLM = jnp.einsum("BGJLK,BGMK->BGJLM", q_BGJLK, k_BGMK).astype(jnp.float32)
    s_BGJLM = jnp.where(mask_BLM[:, None, None], s_BGJLM, jnp.finfo(jnp.float32).min)
    p_BGJLM = dropout(jax.nn.softmax(s_BGJLM, axis=-1), dropout_rate, key)
    out_BGJLK = jnp.einsum("BGJLM,BGMK->BGJLK", p_BGJLM.astype(v_BGMK.dtype), v_BGMK)
    return jnp.moveaxis(out_BGJLK, 3, 1).reshape(B, L, H, K)

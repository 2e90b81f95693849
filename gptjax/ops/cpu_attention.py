"""Plain attention of whole rows without the future: the products above the diagonal are never made.

Queries are taken in a few chunks, unrolled when compiled, and each meets the keys up to its own end only: 4 chunks save
37 % of the scores, exponentials and products. What a CPU is slow at is left out: scores stand keys by queries, forward
and backward, so that no product has a transposed operand and the softmax reduces over rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.ops.reference import AttentionMask, dense_mask

# Smaller chunks skip more, but their products become too small for the processor, and the program longer.
CHUNK, MOST_CHUNKS = 64, 8


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float
    chunks: tuple[tuple[int, int, int], ...]  # first key, first query, end of both; queries see no other keys


def attend_causal_chunked(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """out_BLHK of attention.attend for an aligned mask, forward and backward; it holds about half of the L x L scores.

    It has no dropout. Its output bears the name "attention" for remat.
    """
    assert mask.aligned, "chunks of queries meet the keys up to their own end only where query l is at place l"
    length = q_BLHK.shape[1]
    count = max(1, min(MOST_CHUNKS, length // CHUNK))
    edges = [length * i // count for i in range(count + 1)]
    seen = window if isinstance(window, int) else length  # a window that is known before anything runs
    chunks = tuple((max(0, start - seen + 1), start, end) for start, end in zip(edges, edges[1:]))
    options = _Options(scale, softcap, chunks)
    return _attend(options, q_BLHK, k_BLGK, v_BLGK, jnp.swapaxes(dense_mask(mask, k_BLGK.shape[1], window), 1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q_BLHK, k_BLGK, v_BLGK, mask_BML):
    return _forward(options, q_BLHK, k_BLGK, v_BLGK, mask_BML)[0]


def _forward(options, q_BLHK, k_BLGK, v_BLGK, mask_BML):
    (B, L, H, K), G = q_BLHK.shape, k_BLGK.shape[2]
    q_BGKJL = jnp.transpose((q_BLHK * options.scale).reshape(B, L, G, H // G, K), (0, 2, 4, 3, 1))
    k_BGMK, v_BGKM = jnp.moveaxis(k_BLGK, 1, 2), jnp.transpose(v_BLGK, (0, 2, 3, 1))
    out, kept = [], []
    for first, start, end in options.chunks:
        keys, queries = slice(first, end), slice(start, end)
        s_BGMJL = jnp.einsum("BGMK,BGKJL->BGMJL", k_BGMK[:, :, keys], q_BGKJL[..., queries]).astype(jnp.float32)
        slope_BGMJL = None
        if options.softcap:
            tanh_BGMJL = jnp.tanh(s_BGMJL / options.softcap)
            s_BGMJL, slope_BGMJL = options.softcap * tanh_BGMJL, 1 - tanh_BGMJL**2
        s_BGMJL = jnp.where(mask_BML[:, None, keys, None, queries], s_BGMJL, jnp.finfo(jnp.float32).min)
        p_BGMJL = jax.nn.softmax(s_BGMJL, axis=2).astype(v_BLGK.dtype)
        out.append(jnp.einsum("BGKM,BGMJL->BGKJL", v_BGKM[..., keys], p_BGMJL))
        kept.append((p_BGMJL, slope_BGMJL))
    out_BLHK = jnp.transpose(jnp.concatenate(out, axis=-1), (0, 4, 1, 3, 2)).reshape(B, L, H, K)
    out_BLHK = checkpoint_name(out_BLHK, "attention")
    return out_BLHK, (q_BLHK, k_BLGK, v_BLGK, kept)


def _backward(options, saved, g_BLHK):
    q_BLHK, k_BLGK, v_BLGK, kept = saved
    (B, L, H, K), G = q_BLHK.shape, k_BLGK.shape[2]

    q_BGJLK, g_BGJLK = (
        jnp.transpose(x_BLHK.reshape(B, L, G, H // G, K), (0, 2, 3, 1, 4))
        for x_BLHK in (q_BLHK * options.scale, g_BLHK)
    )
    g_BGKJL = jnp.transpose(g_BGJLK, (0, 1, 4, 2, 3))
    k_BGKM, v_BGMK = jnp.transpose(k_BLGK, (0, 2, 3, 1)), jnp.moveaxis(v_BLGK, 1, 2)
    dk_BGMK, dv_BGMK, dq = jnp.zeros(v_BGMK.shape, jnp.float32), jnp.zeros(v_BGMK.shape, jnp.float32), []
    for (first, start, end), (p_BGMJL, slope_BGMJL) in zip(options.chunks, kept, strict=True):
        keys, queries = slice(first, end), slice(start, end)
        dp_BGMJL = jnp.einsum("BGMK,BGKJL->BGMJL", v_BGMK[:, :, keys], g_BGKJL[..., queries]).astype(jnp.float32)
        # The mean of dp not by the output, as FlashAttention has it: what was rounded in dp would not cancel.
        weights_BGMJL = p_BGMJL.astype(jnp.float32)
        mean_BGMJL = (weights_BGMJL * dp_BGMJL).sum(axis=2, keepdims=True)
        ds_BGMJL = weights_BGMJL * (dp_BGMJL - mean_BGMJL)
        ds_BGMJL = (ds_BGMJL if slope_BGMJL is None else ds_BGMJL * slope_BGMJL).astype(k_BLGK.dtype)
        dq.append(jnp.einsum("BGKM,BGMJL->BGKJL", k_BGKM[..., keys], ds_BGMJL))
        dk = jnp.einsum("BGMJL,BGJLK->BGMK", ds_BGMJL, q_BGJLK[..., queries, :])
        dv = jnp.einsum("BGMJL,BGJLK->BGMK", p_BGMJL, g_BGJLK[..., queries, :])
        dk_BGMK = dk_BGMK.at[:, :, keys].add(dk.astype(jnp.float32))
        dv_BGMK = dv_BGMK.at[:, :, keys].add(dv.astype(jnp.float32))
    dq_BGKJL = jnp.concatenate(dq, axis=-1) * options.scale
    dq_BLHK = jnp.transpose(dq_BGKJL, (0, 4, 1, 3, 2)).reshape(B, L, H, K)
    dk_BLGK, dv_BLGK = (jnp.moveaxis(x, 2, 1) for x in (dk_BGMK, dv_BGMK))
    return dq_BLHK.astype(q_BLHK.dtype), dk_BLGK.astype(k_BLGK.dtype), dv_BLGK.astype(v_BLGK.dtype), None


_attend.defvjp(_forward, _backward)

"""Attention as pure functions: masks, and the plain reference that a faster path must equal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptjax.parallel import context


@functools.partial(jax.tree_util.register_dataclass, meta_fields=["aligned", "shards"],
                   data_fields=["query_BL", "query_segments_BL", "key_segments_BM", "until_BM"])  # fmt: skip
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Mask of attention without an L x M array: a query sees keys at places m <= query_BL in its segment.

    query_BL is the place of each query among the keys. Segments are None where all keys belong to one document. Known
    before anything runs is, of rows with as many keys as queries, whether query l is at place l (aligned), or else how
    many context shards' zigzag order both stand in (shards, see parallel/context.py). In a row that holds a tree of
    texts (see `tree`), until_BM is the place from which on a key is seen no more.
    """

    query_BL: jax.Array
    query_segments_BL: jax.Array | None = None
    key_segments_BM: jax.Array | None = None
    until_BM: jax.Array | None = None
    aligned: bool = False
    shards: int = 1

    @property
    def of_rows(self) -> bool:
        """Queries and keys are the same rows, as in training; a cache's queries meet keys that were there before."""
        return self.aligned or self.shards > 1


def causal(segments_BL: jax.Array, packed: bool = True, shards: int = 1) -> AttentionMask:
    """A training row: position l sees m where m <= l and both lie in the same document.

    Padding is segment 0. It sees only itself and other padding, so that no softmax is empty. Where a row is known to
    hold one document and, behind it, padding (not `packed`), the segments are left out: only padding sees more by it.
    With `shards` above 1 segments_BL, and what will be attended, stand in the zigzag order of so many.
    """
    length = segments_BL.shape[1]
    place_L = jnp.arange(length, dtype=jnp.int32) if shards == 1 else context.places(length, shards)
    places_BL = jnp.broadcast_to(place_L, segments_BL.shape)
    segments = segments_BL if packed else None
    return AttentionMask(places_BL, segments, segments, aligned=shards == 1, shards=shards)


def tree(until_BL: jax.Array) -> AttentionMask:
    """A row that holds texts with common beginnings once: a tree, its tokens depth first.

    The token at place m is seen by its own descendants, which are the places m .. until_BL[m] - 1.
    """
    places_BL = jnp.broadcast_to(jnp.arange(until_BL.shape[1], dtype=jnp.int32), until_BL.shape)
    return AttentionMask(places_BL, until_BM=until_BL, aligned=True)


def seen_until(mask: AttentionMask, last_BL: jax.Array) -> AttentionMask:
    """The mask, with queries that see up to the place last_BL: the tokens of an image all of it, others their own."""
    return dataclasses.replace(mask, query_BL=last_BL, aligned=False)


def cached(positions_BL: jax.Array) -> AttentionMask:
    """Cached decoding: the token at position p sees the slots 0..p, which is all that was written."""
    return AttentionMask(positions_BL)


def dense_mask(mask: AttentionMask, keys: int, window: jax.typing.ArrayLike | None = None) -> jax.Array:
    """mask_BLM over all the keys: what `mask` allows and, with a window, only the last `window` places of it."""
    place_M = jnp.arange(keys, dtype=jnp.int32) if mask.shards == 1 else context.places(keys, mask.shards)
    behind_BLM = mask.query_BL[:, :, None] - place_M
    mask_BLM = behind_BLM >= 0
    if window is not None:
        mask_BLM &= behind_BLM < window
    if mask.query_segments_BL is not None and mask.key_segments_BM is not None:
        mask_BLM &= mask.query_segments_BL[:, :, None] == mask.key_segments_BM[:, None, :]
    if mask.until_BM is not None:
        mask_BLM &= mask.query_BL[:, :, None] < mask.until_BM[:, None, :]
    return mask_BLM


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with chance `rate` and scales the rest to keep the mean; no key means no dropout."""
    if rate == 0.0 or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def attend(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """out_BLHK = softmax(scale q k^T) v over the keys that the mask allows; the softmax is float32.

    Vaswani et al. 2017, with grouped queries (Ainslie et al. 2023): query head h uses key-value head h // J. With a
    soft-cap c the scores s become c tanh(s / c) (Gemma 2, 2024). The plain reference: it holds all L x M scores.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BMGK.shape[2]
    # Heads go before positions, so that both products are plain batched matrices: on a CPU twice as fast.
    q_BGJLK = jnp.moveaxis(q_BLHK.reshape(B, L, G, H // G, K) * scale, 1, 3)
    k_BGMK, v_BGMK = jnp.moveaxis(k_BMGK, 1, 2), jnp.moveaxis(v_BMGK, 1, 2)
    s_BGJLM = jnp.einsum("BGJLK,BGMK->BGJLM", q_BGJLK, k_BGMK).astype(jnp.float32)
    if softcap:
        s_BGJLM = softcap * jnp.tanh(s_BGJLM / softcap)
    seen_BLM = dense_mask(mask, s_BGJLM.shape[-1], window)
    s_BGJLM = jnp.where(seen_BLM[:, None, None], s_BGJLM, jnp.finfo(jnp.float32).min)
    p_BGJLM = dropout(jax.nn.softmax(s_BGJLM, axis=-1), dropout_rate, key)
    out_BGJLK = jnp.einsum("BGJLM,BGMK->BGJLK", p_BGJLM.astype(v_BGMK.dtype), v_BGMK)
    return jnp.moveaxis(out_BGJLK, 3, 1).reshape(B, L, H, -1)

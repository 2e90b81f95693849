"""Attention by blocks with an online softmax: memory linear in length, forward and backward, on every platform.

Rabe & Staats 2021 (Self-attention does not need O(n^2) memory) in the form of FlashAttention-2 (Dao 2023): queries and
keys are taken a block at a time, and only the output and one log-sum-exp a query and head are kept for the backward
pass, which computes the scores again. Blocks in which no query sees a key are not visited.

Where devices share a row (the context axis), each has some of its queries, keys and values. The keys and values are
gathered whole for one layer at a time, forward and again backward, so that only parts are kept between the two.

Beside the alphabet of sharding.py, Q counts blocks of queries and C blocks of keys.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gptjax.ops.reference import AttentionMask
from gptjax.parallel import context
from gptjax.parallel.sharding import axes_of, on_each_device


@functools.partial(jax.tree_util.register_dataclass, meta_fields=[],
                   data_fields=["first_BL", "last_BL", "segments", "until_BM"])  # fmt: skip
@dataclasses.dataclass(frozen=True)
class _Span:
    """Each query sees the keys first_BL <= m <= last_BL, of those in its segment or with last_BL < until_BM."""

    first_BL: jax.Array
    last_BL: jax.Array
    segments: tuple[jax.Array, jax.Array] | None
    until_BM: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float
    block: int
    of_rows: bool  # the keys are the queries' own rows
    shards: int  # of the zigzag order; 1: none


def attend_blockwise(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
    softcap: float = 0.0,
    block: int = 512,
) -> jax.Array:
    """out_BLHK of attention.attend, with no array of size L x M in the forward or the backward pass.

    A window may be traced, as in a scan over layers; a huge one is none. `block` is the number of queries, and of keys,
    in a block; lengths need not be multiples of it. A query that sees no key gives 0. Attention dropout would have to
    keep or recompute L x M random bits: a model.dropout above 0 is refused together with blockwise attention when the
    settings are checked, and this function has none.
    """
    M = k_BMGK.shape[1]
    last_BL = jnp.minimum(mask.query_BL, M - 1)
    first_BL = jnp.zeros_like(last_BL) if window is None else jnp.maximum(mask.query_BL - window + 1, 0)
    query_BL, key_BM = mask.query_segments_BL, mask.key_segments_BM
    segments = None if query_BL is None or key_BM is None else (query_BL, key_BM)
    span = _Span(first_BL, last_BL, segments, mask.until_BM)
    k_BMGK, v_BMGK = divisible(q_BLHK, k_BMGK, v_BMGK)
    options = _Options(scale, softcap, block, mask.of_rows and mask.until_BM is None, mask.shards)
    return _attend(options, q_BLHK, k_BMGK, v_BMGK, span)


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
    """out_BLHK of attention.attend, of queries at the places query_BL of the rows first .. first + B - 1 of a cache.

    Only the first `blocks` blocks of `block` keys are read. A block in which a row sees nothing leaves that row's
    numbers as they are, to the bit: so how far other rows have come, and how long a cache is, changes none of them.
    """
    B, L, H, K = q_BLHK.shape
    G = k_SGMK.shape[1]
    q_BGJLK = _grouped(q_BLHK * scale, G)

    def read(c, carry):
        k_BGMK, v_BGMK = (
            jax.lax.dynamic_slice(x, (first, 0, c * block, 0), (B, G, block, K)).astype(q_BLHK.dtype)
            for x in (k_SGMK, v_SGMK)
        )
        s_BGJLM, _ = _scores(softcap, _product("BGJLK,BGMK->BGJLM", q_BGJLK, k_BGMK))
        behind_BLM = query_BL[:, :, None] - (c * block + jnp.arange(block))
        seen_BLM = behind_BLM >= 0 if window is None else (behind_BLM >= 0) & (behind_BLM < window)
        return _with_block(carry, jnp.where(seen_BLM[:, None, None], s_BGJLM, -jnp.inf), v_BGMK)

    nothing = _nothing_seen((B, G, H // G, L, K))
    _, sum_BGJL, acc_BGJLK = jax.lax.fori_loop(0, blocks, read, nothing)
    return _ungrouped(acc_BGJLK / jnp.where(sum_BGJL > 0, sum_BGJL, 1.0)[..., None]).astype(q_BLHK.dtype)


def divisible(q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values whose heads lie over the tensor axis wherever those of the queries do.

    Where they are too few for it, each query head brings a copy of its own, and those divide.
    """
    axes = _axes(q_BLHK, k_BMGK)
    if "H" not in axes or "G" in axes:
        return k_BMGK, v_BMGK
    copies = q_BLHK.shape[2] // k_BMGK.shape[2]
    return jnp.repeat(k_BMGK, copies, axis=2), jnp.repeat(v_BMGK, copies, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, span: _Span) -> jax.Array:
    return _attend_forward(options, q_BLHK, k_BMGK, v_BMGK, span)[0]


def _attend_forward(options, q_BLHK, k_BMGK, v_BMGK, span):
    def gathered(q_BLHK, *keys_and_span):
        return _forward(options, q_BLHK, *_whole(options, axes, *keys_and_span))

    axes = _axes(q_BLHK, k_BMGK)
    forward = _on_each_device(gathered, options, axes, span, "BLHK BHL")
    # Named, so that a remat policy that keeps "attention" spares the backward pass this whole loop.
    out_BLHK, lse_BHL = checkpoint_name(forward(q_BLHK, k_BMGK, v_BMGK, span), "attention")
    return out_BLHK, (q_BLHK, k_BMGK, v_BMGK, span, out_BLHK, lse_BHL)


def _attend_backward(options, kept, g_BLHK):
    q_BLHK, k_BMGK, _, span, _, _ = kept

    def summed(q_BLHK, k_BMGK, v_BMGK, span, *more):
        k_BMGK, v_BMGK, span = _whole(options, axes, k_BMGK, v_BMGK, span)
        dq_BLHK, *dkv = _backward(options, q_BLHK, k_BMGK, v_BMGK, span, *more)
        if "L" in axes:  # devices that share a row's queries each have a part of the gradient of all of its keys
            shared = options.of_rows
            dkv = [context.part_of_sum(x, axes["L"], options.shards) if shared else jax.lax.psum(x, axes["L"])
                   for x in dkv]  # fmt: skip
        return dq_BLHK, *dkv

    axes = _axes(q_BLHK, k_BMGK)
    backward = _on_each_device(summed, options, axes, span, f"BLHK {_keys(options)} {_keys(options)}")
    return (*backward(*kept, g_BLHK), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _axes(q_BLHK: jax.Array, k_BMGK: jax.Array) -> dict[str, tuple[str, ...]]:
    return axes_of({**dict(zip("BLH", q_BLHK.shape)), "G": k_BMGK.shape[2]})


def _keys(options: _Options) -> str:
    """Keys that are the queries' own rows lie where the queries do; a cache is whole along M."""
    return "BLGK" if options.of_rows else "BMGK"


def _whole(options, axes, k_BMGK, v_BMGK, span):
    """Gathers the keys, values and segments of whole rows from the shards of the devices, in their own order."""
    if not options.of_rows or "L" not in axes:
        assert options.shards == 1, "rows in zigzag order lie over the context axis"
        return k_BMGK, v_BMGK, span
    k_BMGK, v_BMGK = (context.gather_length(x, axes["L"], options.shards) for x in (k_BMGK, v_BMGK))
    if span.segments is not None:
        query_BL, key_BM = span.segments
        span = dataclasses.replace(span, segments=(query_BL, context.gather_length(key_BM, axes["L"], options.shards)))
    return k_BMGK, v_BMGK, span


def _on_each_device(function: Callable, options: _Options, axes: dict, span: _Span, outputs: str) -> Callable:
    """function(q_BLHK, k_BMGK, v_BMGK, span[, out_BLHK, lse_BHL, g_BLHK]) on each device's rows, heads and places.

    Each device then has loops of its own, as long as its own rows and queries need. Left to itself, XLA would put the
    collectives inside the loops and, where the length is sharded, have each device do all of it.
    """
    keys = _keys(options)
    segments, until = span.segments and ("BL", keys[:2]), None if span.until_BM is None else keys[:2]
    of_span: Any = dataclasses.replace(span, first_BL="BL", last_BL="BL", segments=segments, until_BM=until)
    words = ("BLHK", keys, keys, of_span, "BLHK", "BHL", "BLHK")

    def call(*arguments):
        inputs = words[: len(arguments)]
        return on_each_device(function, axes, inputs, tuple(outputs.split()))(*arguments)

    return call


def _forward(options, q_BLHK, k_BMGK, v_BMGK, span):
    B, L, H, K = q_BLHK.shape
    M, G = k_BMGK.shape[1:3]
    J, (size_L, size_M) = H // G, _sizes(options, L, M)
    start_Q, _, from_Q, until_Q = visits(span, options.shards, M, size_L, size_M)

    def query_block(q, carry):
        start = start_Q[q]
        q_BGJLK = _grouped(_cut(q_BLHK, start, size_L) * options.scale, G)
        part = _part(span, start, size_L)

        def key_block(c, carry):
            k_BGMK, v_BGMK = (_heads_first(_cut(t, c * size_M, size_M)) for t in (k_BMGK, v_BMGK))
            s_BGJLM, _ = _scores(options.softcap, _product("BGJLK,BGMK->BGJLM", q_BGJLK, k_BGMK))
            s_BGJLM = jnp.where(_seen(part, c, size_M, M)[:, None, None], s_BGJLM, -jnp.inf)
            return _with_block(carry, s_BGJLM, v_BGMK)

        nothing = _nothing_seen((B, G, J, size_L, K))
        top_BGJL, sum_BGJL, acc_BGJLK = jax.lax.fori_loop(from_Q[q], until_Q[q], key_block, nothing)
        seen_BGJL = sum_BGJL > 0
        sum_BGJL = jnp.where(seen_BGJL, sum_BGJL, 1.0)
        lse_BGJL = jnp.where(seen_BGJL, top_BGJL + jnp.log(sum_BGJL), 0.0)
        out_BLHK = _ungrouped(acc_BGJLK / sum_BGJL[..., None]).astype(q_BLHK.dtype)
        return (
            jax.lax.dynamic_update_slice_in_dim(carry[0], out_BLHK, start, 1),
            jax.lax.dynamic_update_slice_in_dim(carry[1], lse_BGJL.reshape(B, H, size_L), start, 2),
        )

    whole = (jnp.zeros_like(q_BLHK), jnp.zeros((B, H, L), jnp.float32))
    return jax.lax.fori_loop(0, len(start_Q), query_block, whole)


def _backward(options, q_BLHK, k_BMGK, v_BMGK, span, out_BLHK, lse_BHL, g_BLHK):
    L, M, G = q_BLHK.shape[1], *k_BMGK.shape[1:3]
    size_L, size_M = _sizes(options, L, M)
    start_Q, new_Q, from_Q, until_Q = visits(span, options.shards, M, size_L, size_M)

    def query_block(q, grads):
        dq_BLHK, dk_BMGK, dv_BMGK = grads
        start = start_Q[q]
        # The last block may reach back into the one before; rows that were done there count nothing here.
        new_L = start + jnp.arange(size_L) >= new_Q[q]
        g_BGJLK = _grouped(jnp.where(new_L[:, None, None], _cut(g_BLHK, start, size_L), 0), G)
        q_BGJLK = _grouped(_cut(q_BLHK, start, size_L) * options.scale, G)
        out_BGJLK = _grouped(_cut(out_BLHK, start, size_L), G)
        lse_BGJL = jax.lax.dynamic_slice_in_dim(lse_BHL, start, size_L, 2).reshape(q_BGJLK.shape[:-1])
        # Row sums of p dp, without p: FlashAttention-2, equation 4.
        delta_BGJL = jnp.sum(g_BGJLK.astype(jnp.float32) * out_BGJLK.astype(jnp.float32), axis=-1)
        # Scores stand keys by queries here: then no product has a transposed operand of the size of a block.
        q_BGKJL, g_BGKJL = (jnp.moveaxis(t, -1, 2) for t in (q_BGJLK, g_BGJLK))
        part = _part(span, start, size_L)

        def key_block(c, carry):
            dq_BGKJL, dk_BMGK, dv_BMGK = carry
            k_BGMK, v_BGMK = (_heads_first(_cut(t, c * size_M, size_M)) for t in (k_BMGK, v_BMGK))
            s_BGMJL, slope = _scores(options.softcap, _product("BGMK,BGKJL->BGMJL", k_BGMK, q_BGKJL))
            seen_BML = jnp.swapaxes(_seen(part, c, size_M, M), 1, 2)
            p_BGMJL = jnp.where(seen_BML[:, None, :, None], jnp.exp(s_BGMJL - lse_BGJL[:, :, None]), 0.0)
            dp_BGMJL = _product("BGMK,BGKJL->BGMJL", v_BGMK, g_BGKJL)
            ds_BGMJL = (p_BGMJL * (dp_BGMJL - delta_BGJL[:, :, None]) * slope).astype(k_BGMK.dtype)
            dv_BGMK = _product("BGMJL,BGJLK->BGMK", p_BGMJL.astype(g_BGJLK.dtype), g_BGJLK)
            dk_BGMK = _product("BGMJL,BGJLK->BGMK", ds_BGMJL, q_BGJLK)
            dq_BGKJL = dq_BGKJL + _product("BGKM,BGMJL->BGKJL", jnp.swapaxes(k_BGMK, 2, 3), ds_BGMJL)
            add = functools.partial(_add, start=c * size_M)
            return dq_BGKJL, add(dk_BMGK, _heads_first(dk_BGMK)), add(dv_BMGK, _heads_first(dv_BGMK))

        carry = (jnp.zeros(q_BGKJL.shape, jnp.float32), dk_BMGK, dv_BMGK)
        dq_BGKJL, dk_BMGK, dv_BMGK = jax.lax.fori_loop(from_Q[q], until_Q[q], key_block, carry)
        dq = _ungrouped(jnp.moveaxis(dq_BGKJL, 2, -1)) * options.scale
        return _add(dq_BLHK, dq, start), dk_BMGK, dv_BMGK

    zeros = [jnp.zeros(t.shape, jnp.float32) for t in (q_BLHK, k_BMGK, v_BMGK)]
    grads = jax.lax.fori_loop(0, len(start_Q), query_block, tuple(zeros))
    return tuple(g.astype(t.dtype) for g, t in zip(grads, (q_BLHK, k_BMGK, v_BMGK), strict=True))


def _sizes(options: _Options, L: int, M: int) -> tuple[int, int]:
    """Queries and keys in a block. In zigzag order no block of queries holds some of both of its device's chunks."""
    return min(options.block, L // 2 if options.shards > 1 else L), min(options.block, M)


def visits(span: _Span, shards: int, M: int, size_L: int, size_M: int) -> tuple[jax.Array, ...]:
    """(start_Q, new_Q, from_Q, until_Q): where a block of queries starts, and which blocks of keys it needs.

    These are from <= c < until, the same for all rows: what lies in the future, out of the window, or in other
    documents of every row is left out. Where size_L does not divide the length the last block starts early, so that all
    have one size, and its queries before new were in the block before it.
    """
    L, start_Q, new_Q = span.first_BL.shape[1], [], []
    chunk = L // 2 if shards > 1 else L
    for start in range(0, L, chunk):
        new = start + np.arange(0, chunk, size_L, dtype=np.int32)
        new_Q, start_Q = [*new_Q, *new], [*start_Q, *np.minimum(new, start + chunk - size_L)]
    new_Q, start_Q = jnp.array(new_Q), jnp.array(start_Q)
    start_C = jnp.arange(0, M, size_M)
    rows_QL = start_Q[:, None] + jnp.arange(size_L)
    first_BQ, last_BQ = span.first_BL[:, rows_QL].min(axis=-1), span.last_BL[:, rows_QL].max(axis=-1)
    needed_BQC = (first_BQ[..., None] < start_C + size_M) & (start_C <= last_BQ[..., None])
    keys_CM = jnp.minimum(start_C, M - size_M)[:, None] + jnp.arange(size_M)
    if span.segments is not None:
        # Blocks share a document only where their ranges of segments overlap.
        query_BQL, key_BCM = span.segments[0][:, rows_QL], span.segments[1][:, keys_CM]
        needed_BQC &= query_BQL.min(axis=-1)[:, :, None] <= key_BCM.max(axis=-1)[:, None]
        needed_BQC &= key_BCM.min(axis=-1)[:, None] <= query_BQL.max(axis=-1)[:, :, None]
    if span.until_BM is not None:
        needed_BQC &= (
            span.last_BL[:, rows_QL].min(axis=-1)[:, :, None] < span.until_BM[:, keys_CM].max(axis=-1)[:, None]
        )
    needed_QC, c = needed_BQC.any(axis=0), jnp.arange(len(start_C))
    return start_Q, new_Q, jnp.where(needed_QC, c, len(c)).min(axis=1), jnp.where(needed_QC, c + 1, 0).max(axis=1)


def _part(span: _Span, start: jax.Array, size_L: int) -> _Span:
    """The span of one block of queries."""
    segments = span.segments and (_cut(span.segments[0], start, size_L), span.segments[1])
    return _Span(_cut(span.first_BL, start, size_L), _cut(span.last_BL, start, size_L), segments, span.until_BM)


def _seen(part: _Span, c: jax.Array, size_M: int, M: int) -> jax.Array:
    """seen_BLM of one block of queries and the c-th block of keys, which starts early where it would end after M."""
    place_M = jnp.minimum(c * size_M, M - size_M) + jnp.arange(size_M)
    first_BL = jnp.maximum(part.first_BL, c * size_M)  # what lies before was seen with the block before
    seen_BLM = (first_BL[:, :, None] <= place_M) & (place_M <= part.last_BL[:, :, None])
    if part.segments is not None:
        seen_BLM &= part.segments[0][:, :, None] == _cut(part.segments[1], c * size_M, size_M)[:, None, :]
    if part.until_BM is not None:
        seen_BLM &= part.last_BL[:, :, None] < _cut(part.until_BM, c * size_M, size_M)[:, None, :]
    return seen_BLM


def _scores(softcap: float, s: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """float32 scores and their slope under the soft-cap: d (c tanh(s / c)) / ds = 1 - tanh^2(s / c)."""
    if not softcap:
        return s, 1.0
    t = jnp.tanh(s / softcap)
    return softcap * t, 1 - t**2


def _nothing_seen(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(top_BGJL, sum_BGJL, acc_BGJLK) of an online softmax before its first block, of this shape BGJLK."""
    none_BGJL = jnp.zeros(shape[:-1], jnp.float32)
    # A finite start: where nothing was seen yet, -inf less -inf would be no number.
    return none_BGJL + jnp.finfo(jnp.float32).min, none_BGJL, jnp.zeros(shape, jnp.float32)


def _with_block(
    carry: tuple[jax.Array, jax.Array, jax.Array], s_BGJLM: jax.Array, v_BGMK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The online softmax (Milakov & Gimelshein 2018) with one block of keys more; scores that are not seen are -inf."""
    top_BGJL, sum_BGJL, acc_BGJLK = carry
    new_BGJL = jnp.maximum(top_BGJL, s_BGJLM.max(axis=-1))
    p_BGJLM = jnp.exp(s_BGJLM - new_BGJL[..., None])
    fade_BGJL = jnp.exp(top_BGJL - new_BGJL)
    sum_BGJL = sum_BGJL * fade_BGJL + p_BGJLM.sum(axis=-1)
    out_BGJLK = _product("BGJLM,BGMK->BGJLK", p_BGJLM.astype(v_BGMK.dtype), v_BGMK)
    return new_BGJL, sum_BGJL, acc_BGJLK * fade_BGJL[..., None] + out_BGJLK


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`size` places of dimension 1; a start too near the end is moved back, as dynamic_slice does."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _add(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, start, part.shape[1]) + part, start, axis=1)


def _heads_first(x: jax.Array) -> jax.Array:
    """BMGK to BGMK and back. Heads before positions, so that products are plain batched matrices."""
    return jnp.moveaxis(x, 1, 2)


def _grouped(x_BLHK: jax.Array, G: int) -> jax.Array:
    B, L, H, K = x_BLHK.shape
    return jnp.moveaxis(x_BLHK.reshape(B, L, G, H // G, K), 1, 3)


def _ungrouped(x_BGJLK: jax.Array) -> jax.Array:
    B, G, J, L, K = x_BGJLK.shape
    return jnp.moveaxis(x_BGJLK, 3, 1).reshape(B, L, G * J, K)

"""The key-value cache of decoding: how it lies in memory, the writing of new tokens, and one query's attention to it.

A layer's cache is k_BGKM and v_BGMK, slots M being positions. Keys lie with their numbers before the slots: then the
scores of one query are sums over rows, which XLA on a CPU computes on all cores; values lie slots first, for the same
reason.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.attention import Sight, probabilities
from gptjax.config import ModelConfig
from gptjax.fewrows import several
from gptjax.sharding import constrain, suffix

Cache = dict[str, jax.Array]


def empty_cache(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> list[Cache]:
    """A key-value cache for `rows` sequences of at most `slots` tokens: one k_BGKM and v_BGMK a layer.

    One array a layer, since a stack of them would be copied whole at every step.
    """
    B, G, M, K = rows, cfg.num_kv_heads, slots, cfg.head_size
    return [{"k_BGKM": jnp.zeros((B, G, K, M), dtype), "v_BGMK": jnp.zeros((B, G, M, K), dtype)}
            for _ in range(cfg.num_layers)]  # fmt: skip


def bucket(size: int, most: int) -> int:
    """The size rounded up to 2^i or 3 2^i, from 16 to `most`: few programs to compile, at most half again the work."""
    fits = (n for i in range(4, 64) for n in (1 << i, 3 << (i - 1)) if n >= size)
    return min(next(fits), most)


def room(rows: int) -> int:
    """Free slots that a cache of so many rows gets when it is made or grows.

    More are read in vain by every step; with fewer, compiling for each size takes longer than the reading it saves.
    """
    return max(256, 8192 // rows)


def grown(state: dict[str, Any], slots: int) -> dict[str, Any]:
    """A batch's state, its layers' caches under `cache`, with free slots behind those it has, `slots` in all.

    One array after another takes the place of the old one in `state` itself: two whole caches may not fit.
    """
    for tree in (*state["cache"], state):
        for name in [name for name in tree if "M" in suffix(name)]:
            tree[name] = _grown(tree[name], name, slots)
    return state


@functools.partial(jax.jit, static_argnames=("name", "slots"))
def _grown(x: jax.Array, name: str, slots: int) -> jax.Array:
    more = [(0, slots - size if letter == "M" else 0) for letter, size in zip(suffix(name), x.shape, strict=True)]
    return constrain(jnp.pad(x, more), suffix(name))


def write(cache: Cache, k_BLGK: jax.Array, v_BLGK: jax.Array, start_B: jax.Array) -> Cache:
    """The cache with each row's new keys and values in its slots start .. start + L - 1."""
    return {
        "k_BGKM": _write(cache["k_BGKM"], jnp.transpose(k_BLGK, (0, 2, 3, 1)), start_B, axis=3),
        "v_BGMK": _write(cache["v_BGMK"], jnp.moveaxis(v_BLGK, 1, 2), start_B, axis=2),
    }


def _write(cache: jax.Array, new: jax.Array, start_B: jax.Array, axis: int) -> jax.Array:
    new = new.astype(cache.dtype)
    if len(start_B) > 1:
        return jax.vmap(lambda c, n, s: jax.lax.dynamic_update_slice_in_dim(c, n, s, axis - 1))(cache, new, start_B)
    start = start_B[0]

    def row(_, cache):
        return jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis)

    if jax.default_backend() != "cpu":
        return row(0, cache)
    # XLA on a CPU fuses the write of one row into every reader and then copies the whole cache to keep the old one for
    # them; a loop that runs once, as the compiler can't know, is what it does not look through.
    return jax.lax.fori_loop(0, (start >= 0).astype(jnp.int32), row, cache)


def keys_and_values(cache: Cache, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """k_BMGK and v_BMGK of all slots, as attention of several queries takes them."""
    k_BMGK, v_BMGK = jnp.transpose(cache["k_BGKM"], (0, 3, 1, 2)), jnp.moveaxis(cache["v_BGMK"], 1, 2)
    return k_BMGK.astype(dtype), v_BMGK.astype(dtype)


def attend_one(
    q_BLHK: jax.Array, cache: Cache, sight: Sight, *, scale: float, window: jax.typing.ArrayLike | None, softcap: float
) -> jax.Array:
    """out_BLHK of attention.attend for one query a row, L = 1: its time is that of reading the cache."""
    (B, L, H, K), (G, M) = q_BLHK.shape, cache["v_BGMK"].shape[1:3]
    assert L == 1, "several queries are products of matrices, which attention.attend computes"
    k_BGKM, v_BGMK = (cache[name].astype(q_BLHK.dtype) for name in ("k_BGKM", "v_BGMK"))
    q_BGJK = (q_BLHK * scale).reshape(B, G, H // G, K)
    # As products of a matrix with one row, XLA on a CPU would compute both on one core; for few rows, that is faster.
    sums = G == H and several(B, q_BLHK.dtype.name)
    if sums:
        s_BGJM = (q_BGJK[:, :, 0, :, None] * k_BGKM).sum(2)[:, :, None]
    else:
        s_BGJM = jnp.einsum("BGJK,BGKM->BGJM", q_BGJK, k_BGKM)
    p_BGJM = probabilities(s_BGJM[:, :, :, None], sight, window, softcap)[:, :, :, 0].astype(v_BGMK.dtype)
    if sums and M % 2 == 0:
        # In two parts, which it may not add up in the same loop: a sum of fewer results is not worth its threads.
        parts = p_BGJM.reshape(B, G, 2, M // 2, 1) * v_BGMK.reshape(B, G, 2, M // 2, K)
        out_BGJK = jax.lax.optimization_barrier(parts.sum(3)).sum(2)
    else:
        out_BGJK = jnp.einsum("BGJM,BGMK->BGJK", p_BGJM, v_BGMK)
    return out_BGJK.reshape(B, 1, H, K)

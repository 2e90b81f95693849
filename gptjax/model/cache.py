"""The key-value cache of decoding: how it lies in memory, the writing of new tokens, and one query's attention to it.

A layer's cache holds values v_BGMK and keys k0_BGMK, k1_BGMK, ..., slots M being positions: one array of keys for all
rows, or several for some rows each. XLA on a CPU computes the scores of an array's rows on one core; arrays it shares
between cores where more than eight wait to be computed, as measured.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.ops.cpu_matvec import several
from gptjax.ops.reference import AttentionMask, probabilities
from gptjax.parallel.sharding import constrain, suffix

Cache = dict[str, jax.Array]

# Arrays of keys where several rows are decoded on a CPU: few to compile, and enough to be shared between cores.
KEY_ARRAYS = 10


def empty_cache(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> list[Cache]:
    """A key-value cache for `rows` sequences of at most `slots` tokens: a dict of arrays for each layer.

    They are arrays of their own, since a stack of layers would be copied whole at every step.
    """
    G, M, K = cfg.num_kv_heads, slots, cfg.head_size
    names = {"v_BGMK": rows} | {f"k{i}_BGMK": size for i, size in enumerate(_sizes(rows, jnp.dtype(dtype).name))}
    return [{name: jnp.zeros((B, G, M, K), dtype) for name, B in names.items()} for _ in range(cfg.num_layers)]


def _sizes(rows: int, dtype: str) -> list[int]:
    """The rows of each array of keys. Devices of a mesh share the rows of one array instead."""
    if rows < 2 * KEY_ARRAYS or not several(rows, dtype) or jax.sharding.get_abstract_mesh().size > 1:
        return [rows]
    ends = [rows * i // KEY_ARRAYS for i in range(KEY_ARRAYS + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _keys(cache: Cache) -> list[str]:
    """The names of a layer's arrays of keys, in the order of their rows."""
    return [f"k{i}_BGMK" for i in range(len(cache) - 1)]


def _shares(cache: Cache, *xs: jax.Array) -> Iterator[tuple[str, *tuple[jax.Array, ...]]]:
    """Yields the name of each array of keys and, of every x, which begins with the rows, those that belong to it."""
    ends = list(itertools.accumulate(len(cache[name]) for name in _keys(cache)))
    return zip(_keys(cache), *(jnp.split(x, ends[:-1]) for x in xs), strict=True)


def round_up_length(size: int, most: int) -> int:
    """The size rounded up to 2^i or 3 2^i, from 16 to `most`: few programs to compile, at most half again the work."""
    fits = (n for i in range(4, 64) for n in (1 << i, 3 << (i - 1)) if n >= size)
    return min(next(fits), most)


def headroom(rows: int) -> int:
    """Free slots that a cache of so many rows gets when it is made or grows.

    More are read in vain by every step; with fewer, compiling for each size takes longer than the reading it saves.
    """
    return max(256, 8192 // rows)


def grow(state: dict[str, Any], slots: int) -> dict[str, Any]:
    """A batch's state, its layers' caches under `cache`, with free slots behind those it has, `slots` in all.

    One array after another takes the place of the old one in `state` itself: two whole caches may not fit.
    """
    for tree in (*state["cache"], state):
        for name in [name for name in tree if "M" in suffix(name)]:
            tree[name] = _grown(tree[name], suffix(name), slots)
    return state


@functools.partial(jax.jit, static_argnames=("letters", "slots"))
def _grown(x: jax.Array, letters: str, slots: int) -> jax.Array:
    more = [(0, slots - size if letter == "M" else 0) for letter, size in zip(letters, x.shape, strict=True)]
    return constrain(jnp.pad(x, more), letters)


def write(cache: Cache, k_BLGK: jax.Array, v_BLGK: jax.Array, start_B: jax.Array) -> Cache:
    """The cache with each row's new keys and values in its slots start .. start + L - 1."""
    k_BGLK, v_BGLK = jnp.moveaxis(k_BLGK, 1, 2), jnp.moveaxis(v_BLGK, 1, 2)
    new = {name: _write(cache[name], k, start) for name, k, start in _shares(cache, k_BGLK, start_B)}
    return new | {"v_BGMK": _write(cache["v_BGMK"], v_BGLK, start_B)}


def _write(cache_BGMK: jax.Array, new_BGLK: jax.Array, start_B: jax.Array) -> jax.Array:
    new_BGLK = new_BGLK.astype(cache_BGMK.dtype)
    if len(start_B) > 1:
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return jax.vmap(put)(cache_BGMK, new_BGLK, start_B)
    start = start_B[0]

    def row(_, cache_BGMK):
        return jax.lax.dynamic_update_slice_in_dim(cache_BGMK, new_BGLK, start, axis=2)

    if jax.default_backend() != "cpu":
        return row(0, cache_BGMK)
    # XLA on a CPU fuses the write of one row into every reader and then copies the whole cache to keep the old one for
    # them; a loop that runs once, as the compiler can't know, is what it does not look through.
    return jax.lax.fori_loop(0, (start >= 0).astype(jnp.int32), row, cache_BGMK)


def keys_and_values(cache: Cache, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """k_BMGK and v_BMGK of all slots, as attention of several queries takes them."""
    k_BGMK = jnp.concatenate([cache[name] for name in _keys(cache)])
    return jnp.moveaxis(k_BGMK, 1, 2).astype(dtype), jnp.moveaxis(cache["v_BGMK"], 1, 2).astype(dtype)


def attend_one(
    q_BLHK: jax.Array,
    cache: Cache,
    sight: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None,
    softcap: float,
) -> jax.Array:
    """out_BLHK of attention.attend for one query a row, L = 1: its time is that of reading the cache."""
    (B, L, H, K), (G, M) = q_BLHK.shape, cache["v_BGMK"].shape[1:3]
    assert L == 1, "several queries are products of matrices, which attention.attend computes"
    dtype = q_BLHK.dtype
    q_BGJK = (q_BLHK * scale).reshape(B, G, H // G, K)
    s = [jnp.einsum("BGJK,BGMK->BGJM", q, cache[name].astype(dtype)) for name, q in _shares(cache, q_BGJK)]
    s_BGJM = jnp.concatenate(s)
    p_BGJM = probabilities(s_BGJM[:, :, :, None], sight, window, softcap)[:, :, :, 0].astype(dtype)
    v_BGMK = cache["v_BGMK"].astype(dtype)
    if G == H and M % 2 == 0 and several(B, dtype.name):
        # As a product XLA on a CPU would compute it on one core; for few rows, that is faster. A sum it computes on
        # all, but of this few results only where they are twice as many: so in two parts, which the barriers keep it
        # from adding up in one loop, and from joining to the product that follows.
        parts = p_BGJM.reshape(B, G, 2, M // 2, 1) * v_BGMK.reshape(B, G, 2, M // 2, K)
        parts = jax.lax.optimization_barrier(parts.sum(3))
        out_BGJK = jax.lax.optimization_barrier(parts.sum(2))
    else:
        out_BGJK = jnp.einsum("BGJM,BGMK->BGJK", p_BGJM, v_BGMK)
    return out_BGJK.reshape(B, 1, H, K)

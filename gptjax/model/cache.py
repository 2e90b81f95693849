"""The key-value cache of decoding: a layer's keys k_BGMK and values v_BGMK, whose slots M are positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.ops.blockwise import attend_served
from gptjax.ops.decoding import write_served, write_slots
from gptjax.parallel.sharding import constrain, suffix

Cache = dict[str, jax.Array]

SERVED_BLOCK = 128  # keys that attention over a server's cache reads at a time


def empty_cache(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> list[Cache]:
    """A key-value cache for `rows` sequences of at most `slots` tokens: a dict of arrays for each layer.

    They are arrays of their own, since a stack of layers would be copied whole at every step.
    """
    shape = (rows, cfg.num_kv_heads, slots, cfg.head_size)
    return [{name: jnp.zeros(shape, dtype) for name in ("k_BGMK", "v_BGMK")} for _ in range(cfg.num_layers)]


def write(cache: Cache, k_BLGK: jax.Array, v_BLGK: jax.Array, start_B: jax.Array) -> Cache:
    """The cache with each row's new keys and values in its slots start .. start + L - 1."""
    new = {"k_BGMK": k_BLGK, "v_BGMK": v_BLGK}
    return {name: write_slots(cache[name], jnp.moveaxis(x_BLGK, 1, 2), start_B) for name, x_BLGK in new.items()}


def keys_and_values(cache: Cache, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """k_BMGK and v_BMGK of all slots, as attention takes them."""
    k_BMGK, v_BMGK = (jnp.moveaxis(cache[name], 1, 2).astype(dtype) for name in ("k_BGMK", "v_BGMK"))
    return k_BMGK, v_BMGK


def served_cache(cfg: ModelConfig, slots: int, length: int, dtype: Any) -> list[Cache]:
    """A server's cache: `slots` rows of `length` places, S and M, of which a part goes on at a time (`served`)."""
    shape = (slots, cfg.num_kv_heads, length, cfg.head_size)
    return [{name: jnp.zeros(shape, dtype) for name in ("k_SGMK", "v_SGMK")} for _ in range(cfg.num_layers)]


def served(cache: list[Cache], first: jax.Array, blocks: jax.Array) -> list[Cache]:
    """The cache as `extend` takes it for the rows from `first` on, which see no more than `blocks` blocks of keys."""
    return [{**layer, "first": first, "blocks": blocks} for layer in cache]


def go_on(
    cfg: ModelConfig,
    cache: Cache,
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    start_B: jax.Array,
    query_BL: jax.Array,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, Cache]:
    """Attention outputs of tokens that go on rows of a server's cache from start_B, and the cache with them in it."""
    first, blocks = cache["first"], cache["blocks"]
    k_SGMK, v_SGMK = (
        write_served(cache[name], jnp.moveaxis(x_BLGK, 1, 2), first, start_B)
        for name, x_BLGK in (("k_SGMK", k_BLGK), ("v_SGMK", v_BLGK))
    )
    seen: Any = {"scale": scale, "window": window, "softcap": cfg.attention_softcap, "block": SERVED_BLOCK}
    out_BLHK = attend_served(q_BLHK, k_SGMK, v_SGMK, query_BL, first, blocks, **seen)
    return out_BLHK, {"k_SGMK": k_SGMK, "v_SGMK": v_SGMK}


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

"""The key-value cache of decoding: a layer's keys k_BGMK and values v_BGMK, whose slots M are positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.ops.decoding import write_slots
from gptjax.parallel.sharding import constrain, suffix

Cache = dict[str, jax.Array]


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

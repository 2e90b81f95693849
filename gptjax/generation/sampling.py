"""Samplers: from logits_BV to one token id a row, by filters in the order of transformers."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import GenerateConfig
from gptjax.model.decoder import MASKED

SamplingParams = dict[str, float]

TINY = jnp.finfo(jnp.float32).tiny
PART = 128  # ids of a part of the vocabulary

# Values at which a setting changes nothing. Such a setting is left out, and its filter is not even compiled.
DISABLED = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def active(cfg: GenerateConfig) -> SamplingParams:
    """The settings that change a token's chance; with temperature 0, which takes the likeliest, only the penalty."""
    names = DISABLED if cfg.temperature else ("repetition_penalty",)
    return {name: getattr(cfg, name) for name in names if getattr(cfg, name) != DISABLED[name]}


def sample(
    logits_BV: jax.Array, key_B: jax.Array, settings: dict[str, Any], seen_BV: jax.Array | None = None
) -> jax.Array:
    """One token id a row: drawn from the filtered logits with the row's key, or the likeliest without a temperature."""
    logits_BV = filter_logits(logits_BV, settings, seen_BV)
    if "temperature" not in settings:
        return greedy(logits_BV)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def draw_ids(logits_BV: jax.Array, key_B: jax.Array, temperature: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """(ids_B, log_p_B): an id a row drawn with the row's key from softmax(logits / temperature), and its log p in nats.

    V is cut into parts: one of them is drawn, then an id in it. That takes one exp an id, which log p needs too, and
    two random numbers a row, where `sample` takes a random number and two logarithms an id.
    """
    scaled_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / jnp.maximum(temperature, TINY)
    weight_BPC = jnp.exp(scaled_BV).reshape(len(logits_BV), -1, math.gcd(logits_BV.shape[1], PART))
    sum_BP = weight_BPC.sum(axis=-1)
    u_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)
    part_B = _pick(sum_BP, u_B2[:, 0])
    inside_B = _pick(jnp.take_along_axis(weight_BPC, part_B[:, None, None], axis=1)[:, 0], u_B2[:, 1])
    ids_B = part_B * weight_BPC.shape[-1] + inside_B
    picked_B = jnp.take_along_axis(scaled_BV, ids_B[:, None], axis=-1)[:, 0]
    return ids_B, picked_B - jnp.log(sum_BP.sum(axis=-1))


def _pick(weight_BK: jax.Array, u_B: jax.Array) -> jax.Array:
    """The place in each row where the running sum of its weights passes u times their sum; never one of weight 0."""
    place_K = jnp.arange(weight_BK.shape[1], dtype=jnp.int32)
    below_BK = jnp.where(place_K[:, None] <= place_K, weight_BK[:, :, None], 0).sum(axis=1)
    passed_BK = (below_BK > u_B[:, None] * below_BK[:, -1:]) & (weight_BK > 0)
    last_B = jnp.where(weight_BK > 0, place_K, 0).max(axis=-1)  # where rounding leaves none
    return jnp.where(passed_BK, place_K, last_B[:, None]).min(axis=-1)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """argmax over V, the first of equals. XLA on a CPU computes its own on one core, these two reductions on all."""
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    best_B = logits_BV.max(axis=-1, keepdims=True)
    # NaN is less than nothing: such a row takes the first id.
    return jnp.where(logits_BV < best_B, ids_V[-1], ids_V).min(axis=-1)


def filter_logits(logits_BV: jax.Array, settings: dict[str, Any], seen_BV: jax.Array | None = None) -> jax.Array:
    """The logits to draw from: penalty, temperature, top-k, top-p, min-p, in this order (that of transformers).

    Each filter sees what the ones before it left. Tokens as likely as the last one kept are kept, too.
    """
    if "repetition_penalty" in settings:
        assert seen_BV is not None, "the penalty needs the ids that occurred"
        logits_BV = apply_repetition_penalty(logits_BV, seen_BV, settings["repetition_penalty"])
    if "temperature" in settings:
        # The highest logit is 0 first, so that no temperature, however small, makes the others' ratio infinite.
        logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
        logits_BV = logits_BV / jnp.maximum(settings["temperature"], TINY)
    if "top_k" in settings:
        logits_BV = top_k(logits_BV, settings["top_k"])
    if "top_p" in settings:
        logits_BV = top_p(logits_BV, settings["top_p"])
    if "min_p" in settings:
        logits_BV = min_p(logits_BV, settings["min_p"])
    return logits_BV


def apply_repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Divides positive logits of the tokens that occurred by the penalty and multiplies negative ones by it.

    CTRL, Keskar et al. 2019, section 4.1, in the form for logits of either sign.
    """
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def top_k(logits_BV: jax.Array, k: jax.Array | int) -> jax.Array:
    """Masks all but the k likeliest tokens (Fan et al. 2018)."""
    return jnp.where(_head_of(logits_BV, jnp.ones_like(logits_BV), k), logits_BV, MASKED)


def top_p(logits_BV: jax.Array, p: jax.Array | float) -> jax.Array:
    """Masks all but the likeliest tokens that together reach probability p (nucleus, Holtzman et al. 2020)."""
    return jnp.where(_head_of(logits_BV, jax.nn.softmax(logits_BV), p), logits_BV, MASKED)


def min_p(logits_BV: jax.Array, p: jax.Array | float) -> jax.Array:
    """Masks tokens with less than p times the probability of the likeliest (Nguyen et al. 2024)."""
    return jnp.where(logits_BV >= logits_BV.max(axis=-1, keepdims=True) + jnp.log(p), logits_BV, MASKED)


def _head_of(logits_BV: jax.Array, weight_BV: jax.Array, wanted: jax.Array | float) -> jax.Array:
    """True at the likeliest tokens whose weights together reach `wanted`; everywhere where all do not reach it.

    The cut is found bit by bit, from the top bit of the logits' order as unsigned integers: 32 sums over V, where a
    sort of 50,000 logits takes thirty times as long on a CPU.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    order_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def lower(i, cut_B):
        try_B = cut_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough_B = jnp.where(order_BV >= try_B[:, None], weight_BV, 0).sum(axis=-1) >= wanted
        return jnp.where(enough_B, try_B, cut_B)

    cut_B = jax.lax.fori_loop(0, 32, lower, jnp.zeros(logits_BV.shape[:1], jnp.uint32))
    return order_BV >= cut_B[:, None]

"""Samplers: from logits_BV to one token id a row, by filters in the order of transformers."""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import GenerateConfig
from gptjax.model.head import MASKED

SamplingParams = dict[str, float]

TINY = jnp.finfo(jnp.float32).tiny

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


def log_prob(logits_BV: jax.Array, ids_B: jax.Array, settings: dict[str, Any]) -> jax.Array:
    """log softmax(logits / temperature) of one id a row, in nats: the policy that is drawn from, before any filter.

    Without a temperature that is 1.
    """
    highest_B = logits_BV.max(axis=-1)
    scaled_BV = (logits_BV - highest_B[:, None]) / jnp.maximum(settings.get("temperature", 1.0), TINY)
    picked_B = jnp.take_along_axis(scaled_BV, ids_B[:, None], axis=-1)[:, 0]
    return picked_B - jnp.log(jnp.exp(scaled_BV).sum(axis=-1))


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

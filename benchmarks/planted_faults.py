"""Losses that are wrong in a way that makes a step fast or a model better: throughput.py must find each of them.

Used as `--set loss=planted_faults:dropped_layer`; each builds a loss from the decoder, as every user's own loss does.
"""

import dataclasses
from typing import Any

import jax

from gptjax.model.block import block
from gptjax.model.decoder import Decoder
from gptjax.training.losses import language_model_loss
from gptjax.training.step import LossFn


def dropped_layer(decoder: Decoder) -> LossFn:
    """The last layer is not computed."""
    fewer = dataclasses.replace(decoder.cfg, num_layers=decoder.cfg.num_layers - 1)
    loss_fn = language_model_loss(decoder.clone(cfg=fewer))

    def short(params: Any, frozen: Any, batch: Any, key: jax.Array):
        layers = jax.tree.map(lambda x: x[:-1], params["layers"])
        return loss_fn({**params, "layers": layers}, frozen, batch, key)

    return short


def future_seen(decoder: Decoder) -> LossFn:
    """Each position also sees the next one."""

    def peeking(cfg, p, x_BLD, positions_BL, mask, *rest):
        return block(cfg, p, x_BLD, positions_BL, dataclasses.replace(mask, query_BL=mask.query_BL + 1), *rest)

    return language_model_loss(decoder.clone(block=peeking))


def half_the_rows(decoder: Decoder) -> LossFn:
    """Only the first half of the rows is trained on."""
    loss_fn = language_model_loss(decoder)

    def half(params: Any, frozen: Any, batch: Any, key: jax.Array):
        return loss_fn(params, frozen, {name: x[: len(x) // 2] for name, x in batch.items()}, key)

    return half


def no_mlp_gradient(decoder: Decoder) -> LossFn:
    """The MLPs' weights are not trained."""
    loss_fn = language_model_loss(decoder)

    def stopped(params: Any, frozen: Any, batch: Any, key: jax.Array):
        layers = {n: jax.lax.stop_gradient(x) if n.startswith("w_") else x for n, x in params["layers"].items()}
        return loss_fn({**params, "layers": layers}, frozen, batch, key)

    return stopped

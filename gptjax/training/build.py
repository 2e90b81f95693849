"""A run's decoder, loss, optimizer, initial state and training step, built from its settings; nothing runs yet."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.config import TrainConfig
from gptjax.config.plugins import optional, resolve
from gptjax.config.section import InputError
from gptjax.model.decoder import Decoder, head, init_params, make_decoder
from gptjax.training.loop import LossFn, make_init, make_train_step
from gptjax.training.losses import cross_entropy
from gptjax.training.optim import make_optimizer, make_schedule


def language_model_loss(decoder: Decoder, z_loss: float = 0.0, norms: bool = False) -> LossFn:
    """Mean over weighted tokens of -log p(next token) + z_loss log(Z)^2, in nats.

    With `norms` the metrics hold activation_rms_N, the root mean square of the stream after each layer.
    """

    def loss_fn(params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        del frozen  # nothing is held fixed in pretraining
        inputs = (batch["inputs_BL"], batch["positions_BL"], batch["segments_BL"])
        more: dict[str, Any] = {}
        if norms:
            x_BLD, more["activation_rms_N"] = decoder.apply({"params": params}, *inputs, key=key, method="with_norms")
        else:
            x_BLD, _ = decoder.apply({"params": params}, *inputs, key=key)
        targets = (batch["targets_BL"], batch["weights_BL"], decoder.vocab_size)
        total = cross_entropy(x_BLD, head(params), *targets, z_loss=z_loss, softcap=decoder.cfg.logit_softcap)
        weight = batch["weights_BL"].sum()
        loss = total / jnp.maximum(weight, 1.0)
        return loss, {"loss": loss, "weight": weight} | more

    return loss_fn


class TrainComponents(NamedTuple):
    """The parts of a run, before anything is allocated or compiled."""

    decoder: Decoder
    tx: optax.GradientTransformation
    init: Callable  # (seed) -> TrainState
    step: Callable  # (state, frozen, batch) -> (state, metrics)


def build_components(config: TrainConfig) -> TrainComponents:
    """The decoder, optimizer, initial state and training step of a run, with the user's own loss and block."""
    decoder = make_decoder(config, optional(config.model.block, "model.block"))
    norms, ema = config.log_norms_every > 0, config.optim.ema
    if config.loss:
        if config.optim.z_loss:
            raise InputError(
                f"optim.z_loss={config.optim.z_loss:g} belongs to the built-in loss, whose place loss={config.loss!r} "
                f"takes; set --optim.z-loss 0"
            )
        loss_fn = _checked(resolve(config.loss, "loss")(decoder), config.loss)
    else:
        loss_fn = language_model_loss(decoder, config.optim.z_loss, norms)
    schedule = make_schedule(config.optim, config.steps)
    tx = make_optimizer(config.optim, schedule, config.model)
    step = make_train_step(loss_fn, tx, schedule, config.optim.accumulate, ema, norms)
    return TrainComponents(decoder, tx, make_init(init_params(decoder), tx, ema), step)


def _checked(loss_fn: LossFn, name: str) -> LossFn:
    """The user's own loss; InputError where, traced, it returns no (loss, metrics) with what training reads."""

    def checked(params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        made = loss_fn(params, frozen, batch, key)
        metrics = made[1] if isinstance(made, tuple) and len(made) == 2 else None
        got = f"metrics {sorted(metrics)}" if isinstance(metrics, dict) else f"a {type(made).__name__}"
        if not isinstance(metrics, dict) or not {"loss", "weight"} <= metrics.keys():
            raise InputError(
                f"loss={name!r} returned {got}; wanted (loss, metrics), whose metrics have 'loss', the same loss, and "
                f"'weight', the sum of the weights that it is a mean over"
            )
        return made

    return checked


def check_divisible(config: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Raises InputError where the rows or their length do not divide over the axes of a mesh (mesh.shape)."""
    shards, parts = sizes["data"] * sizes["fsdp"], config.optim.accumulate
    if config.data.batch_size % (shards * parts):
        raise InputError(
            f"data.batch_size={config.data.batch_size} does not divide over mesh.data x mesh.fsdp = {shards} and "
            f"optim.accumulate={parts}; e.g. --data.batch-size {shards * parts}"
        )
    shared, length = sizes["context"], config.data.length
    if shared > 1 and length % (2 * shared):
        raise InputError(
            f"data.length={length} does not divide into two chunks for each of the mesh.context={shared} devices that "
            f"share a row; e.g. --data.length {max(1, length // (2 * shared)) * 2 * shared}"
        )

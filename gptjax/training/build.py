"""A run's decoder, loss, optimizer, initial state and training step, built from its settings; nothing runs yet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from gptjax.config import LoraConfig, TrainConfig
from gptjax.config.plugins import optional, resolve
from gptjax.config.section import InputError
from gptjax.model.decoder import Decoder, init_params, make_decoder
from gptjax.runtime.dtype import preferred_dtype
from gptjax.training.losses import language_model_loss
from gptjax.training.optim import make_optimizer, make_schedule
from gptjax.training.step import Beside, LossFn, make_init, make_train_step


class TrainComponents(NamedTuple):
    """The parts of a run that training needs; nothing is allocated or compiled."""

    decoder: Decoder
    tx: optax.GradientTransformation
    init: Callable  # (seed) -> TrainState
    step: Callable  # (state, frozen, batch) -> (state, metrics)


def build_components(
    config: TrainConfig,
    lora: LoraConfig | None = None,
    loss: Callable[[Decoder], LossFn] | None = None,
    beside: Callable[[Decoder], Beside] | None = None,
) -> TrainComponents:
    """The decoder, optimizer, initial state and training step of a run, with the user's own loss and block.

    With `lora` the state holds its leaves alone, and the step reads the model's parameters in frozen["base"]. The
    state holds the heads in config.heads, too. `loss` builds a stage's own loss from the decoder, in place of the
    language model's, and `beside` a second one.
    Where model.dtype is auto it is that of this process's devices. Raises InputError where loss or model.block can't be
    found, or optim.z_loss is set beside a loss of the user's.
    """
    if config.model.dtype == "auto":
        config = config.with_dtype(preferred_dtype()[0])
    decoder = make_decoder(config, optional(config.model.block, "model.block"))
    norms, ema = config.log_norms_every > 0, config.optim.ema
    if loss is not None:
        loss_fn = loss(decoder)
    elif config.loss:
        if config.optim.z_loss:
            raise InputError(
                f"optim.z_loss={config.optim.z_loss:g} belongs to the built-in loss, whose place loss={config.loss!r} "
                f"takes; set --optim.z-loss 0"
            )
        loss_fn = _checked(resolve(config.loss, "loss")(decoder), config.loss)
    else:
        loss_fn = language_model_loss(decoder, config.optim.z_loss, norms)
    schedule = make_schedule(config.optim, config.updates)
    tx = make_optimizer(config.optim, schedule, config.model)
    params, second = init_params(decoder), beside(decoder) if beside else None
    if lora is not None:
        from gptjax.model.lora import adapted, init_lora

        loss_fn, params = adapted(loss_fn, lora.scale), init_lora(lora, config.model)
        second = second and second._replace(loss_fn=adapted(second.loss_fn, lora.scale))
    if config.heads:
        from gptjax.model.heads import add_heads

        params = add_heads(params, config.heads, config)
    step = make_train_step(loss_fn, tx, schedule, config.optim.accumulate, ema, norms, second)
    return TrainComponents(decoder, tx, make_init(params, tx, ema), step)


def _checked(loss_fn: LossFn, name: str) -> LossFn:
    """The user's own loss; raises InputError when traced, unless it returns the (loss, metrics) that training reads."""

    def checked(params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        result = loss_fn(params, frozen, batch, key)
        metrics = result[1] if isinstance(result, tuple) and len(result) == 2 else None
        got = f"metrics {sorted(metrics)}" if isinstance(metrics, dict) else f"a {type(result).__name__}"
        if not isinstance(metrics, dict) or not {"loss", "weight"} <= metrics.keys():
            raise InputError(
                f"loss={name!r} returned {got}; wanted (loss, metrics), whose metrics have 'loss', the same loss, and "
                f"'weight', the sum of the weights that it is a mean over"
            )
        return result

    return checked

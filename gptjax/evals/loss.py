"""Loss, perplexity and bits per byte over validation sets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config.section import InputError
from gptjax.data.validation import MeasuredSet
from gptjax.model.decoder import Decoder, head, hidden_states
from gptjax.parallel.sharding import local_rows, shardings, to_global
from gptjax.training.losses import cross_entropy


def make_eval_step(decoder: Decoder, mesh: Mesh, params: Any, batch: Any) -> Callable:
    """Builds eval_step(params, batch) -> (summed loss in nats, summed weight), compiled for the mesh."""

    def eval_step(params, batch):
        x_BLD, _ = hidden_states(decoder, params, batch)
        args = (x_BLD, head(params), batch["targets_BL"], batch["weights_BL"], decoder.vocab_size)
        return cross_entropy(*args, softcap=decoder.cfg.logit_softcap), batch["weights_BL"].sum()

    return jax.jit(eval_step, in_shardings=(shardings(params, mesh), shardings(batch, mesh)))


def evaluate(
    eval_step: Callable, params: Any, validation: Sequence[MeasuredSet], max_rows: int, mesh: Mesh
) -> dict[str, Any]:
    """Means over every weighted token of the validation sets, or of the first max_rows rows of each (0: all).

    eval_loss is in nats a token, eval_perplexity its exponential, and eval_bits_per_byte = loss / ln 2 / (bytes of text
    that a predicted token stands for), which compares across tokenizers. eval_tokens counts the tokens. These cover
    the run's own validation split; a named set, a source of a mixture too, has its eval_loss_NAME and
    eval_bits_per_byte_NAME besides.
    """
    nats = tokens = size = 0.0
    named: dict[str, float] = {}
    for dataset in validation:
        loss_sum = weight_sum = 0.0
        rows = local_rows(dataset.config.data.batch_size, mesh)
        for batch in dataset.batches(max_rows, rows.numbers):
            loss, weight = jax.device_get(eval_step(params, to_global(batch, mesh, rows)))
            loss_sum, weight_sum = loss_sum + float(loss), weight_sum + float(weight)
        if not weight_sum:
            name = f" {dataset.name!r}" if dataset.name else ""
            raise InputError(
                f"the validation set{name} holds no token; give more text or raise data.validation_fraction"
            )
        if dataset.name:
            loss = loss_sum / weight_sum
            named |= {f"eval_loss_{dataset.name}": loss}
            named |= {f"eval_bits_per_byte_{dataset.name}": loss / math.log(2) / dataset.bytes_per_target}
        if dataset.own:
            nats, tokens = nats + loss_sum, tokens + weight_sum
            size += weight_sum * dataset.bytes_per_target
    loss = nats / tokens
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),
        "eval_bits_per_byte": nats / math.log(2) / size,
        "eval_tokens": int(tokens),
        **named,
    }

"""Loss, perplexity and bits per byte over validation sets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config.section import InputError
from gptjax.data.validation import MeasuredSet
from gptjax.model.decoder import Decoder, head, hidden_states
from gptjax.parallel.sharding import local_rows, shardings, to_global
from gptjax.training.losses import cross_entropy, likeliest


def make_eval_step(decoder: Decoder, mesh: Mesh, params: Any, batch: Any, answers: bool = False) -> Callable:
    """Builds eval_step(params, batch) -> (summed loss in nats, summed weight), compiled for the mesh.

    With `answers`, for rows of conversations, it returns the numbers of `exact_answers` besides.
    """

    def eval_step(params, batch):
        x_BLD, _ = hidden_states(decoder, params, batch)
        args = (x_BLD, head(params), batch["targets_BL"], batch["weights_BL"], decoder.vocab_size)
        loss, weight = cross_entropy(*args, softcap=decoder.cfg.logit_softcap), batch["weights_BL"].sum()
        return (loss, weight, *exact_answers(decoder, params, x_BLD, batch)) if answers else (loss, weight)

    return jax.jit(eval_step, in_shardings=(shardings(params, mesh), shardings(batch, mesh)))


def exact_answers(
    decoder: Decoder, params: Any, x_BLD: jax.Array, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(answers, those of which every token is the likeliest one) in rows of conversations.

    An answer is a run of weighted targets in one segment.
    """
    weighted_BL = batch["weights_BL"] > 0
    missed_BL = weighted_BL & (likeliest(x_BLD, head(params), decoder.vocab_size) != batch["targets_BL"])
    goes_on_BL = (
        weighted_BL[:, 1:] & weighted_BL[:, :-1] & (batch["segments_BL"][:, 1:] == batch["segments_BL"][:, :-1])
    )
    begins_BL = weighted_BL & ~jnp.pad(goes_on_BL, ((0, 0), (1, 0)))
    ends_BL = weighted_BL & ~jnp.pad(goes_on_BL, ((0, 0), (0, 1)))
    misses_BL = jnp.cumsum(missed_BL, axis=1)
    before_BL = jax.lax.cummax(jnp.where(begins_BL, misses_BL - missed_BL, 0), axis=1)
    return ends_BL.sum(), (ends_BL & (misses_BL == before_BL)).sum()


def evaluate(
    eval_step: Callable, params: Any, validation: Sequence[MeasuredSet], max_rows: int, mesh: Mesh
) -> dict[str, Any]:
    """Means over every weighted token of the validation sets, or of the first max_rows rows of each (0: all).

    eval_loss is in nats a token, eval_perplexity its exponential, and eval_bits_per_byte = loss / ln 2 / (bytes of text
    that a predicted token stands for), which compares across tokenizers. eval_tokens counts the tokens. These cover
    the run's own validation split; a named set, a source of a mixture too, has its eval_loss_NAME and
    eval_bits_per_byte_NAME besides. Where eval_step counts answers, eval_answers_exact is the share of those of which
    every token is the likeliest one: an answer that is drawn greedily is the same.
    """
    nats = tokens = size = num_answers = num_exact = 0.0
    named: dict[str, float] = {}
    for dataset in validation:
        loss_sum = weight_sum = 0.0
        rows = local_rows(dataset.config.data.batch_size, mesh)
        for batch in dataset.batches(max_rows, rows.numbers):
            loss, weight, *counts = jax.device_get(eval_step(params, to_global(batch, mesh, rows)))
            loss_sum, weight_sum = loss_sum + float(loss), weight_sum + float(weight)
            if counts and dataset.own:
                num_answers, num_exact = num_answers + float(counts[0]), num_exact + float(counts[1])
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
        **({"eval_answers_exact": num_exact / num_answers} if num_answers else {}),
        "eval_tokens": int(tokens),
        **named,
    }

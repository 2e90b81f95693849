"""Loss, perplexity and bits per byte over a validation split."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import DataConfig, TrainConfig
from gptjax.data.batches import validation_batches
from gptjax.data.corpus import Split
from gptjax.decoder import Decoder, head
from gptjax.losses import cross_entropy
from gptjax.settings import InputError
from gptjax.sharding import put, shardings


def make_eval_step(decoder: Decoder, mesh: Mesh, params: Any, batch: Any) -> Callable:
    """Builds eval_step(params, batch) -> (summed loss in nats, summed weight), compiled for the mesh."""

    def eval_step(params, batch):
        x_BLD, _ = decoder.apply({"params": params}, batch["inputs_BL"], batch["positions_BL"], batch["segments_BL"])
        args = (x_BLD, head(params), batch["targets_BL"], batch["weights_BL"], decoder.vocab_size)
        return cross_entropy(*args), batch["weights_BL"].sum()

    return jax.jit(eval_step, in_shardings=(shardings(params, mesh), shardings(batch, mesh)))


def evaluate(eval_step: Callable, params: Any, split: Split, config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Means over every weighted token of the split, or of its first evaluate.max_rows rows.

    eval_loss is in nats a token, eval_perplexity its exponential, and eval_bits_per_byte = loss / ln 2 / (bytes of text
    that a predicted token stands for), which compares across tokenizers. eval_tokens counts the tokens.
    """
    cfg = config.data
    nats = tokens = 0.0
    for batch in validation_batches(split, cfg, config.evaluate.max_rows):
        loss, weight = jax.device_get(eval_step(params, put(batch, mesh)))
        nats, tokens = nats + float(loss), tokens + float(weight)
    if not tokens:
        raise InputError("the validation split holds no token; give more text or raise data.validation_fraction")
    loss = nats / tokens
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),
        "eval_bits_per_byte": loss / math.log(2) / _bytes_per_target(split, cfg),
        "eval_tokens": int(tokens),
    }


def _bytes_per_target(split: Split, cfg: DataConfig) -> float:
    """Bytes of text that a predicted token of the split stands for.

    Each document is stored as beginning, text, end. A beginning is predicted only where attention crosses documents.
    """
    crossing = cfg.cross_documents and cfg.packing == "packed"
    return split.num_bytes / (split.num_tokens - (1 if crossing else split.num_documents))

"""Log-probabilities of whole answers under a decoder, several answers to a prompt in a batch, and what is held out."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.align.losses import preference_terms
from gptjax.config import DpoConfig
from gptjax.data.preferences import PromptRows
from gptjax.model.decoder import Decoder, Params, head
from gptjax.parallel.sharding import local_rows, on_host, shardings, to_global
from gptjax.training.losses import token_log_probs

Batch = dict[str, jax.Array]


def answer_log_probs(decoder: Decoder) -> Callable[[Params, Batch], jax.Array]:
    """Builds log_p_BS(params, batch): the sum over an answer's tokens of log p, in nats; 0 where there is no answer.

    The batch is that of `data.preferences`: inputs_BSL and the others, one answer a row behind its prompt, weights_BSL
    1 where the target is a token of the answer, its end included. There is no dropout.
    """

    def log_probs(params: Params, batch: Batch) -> jax.Array:
        shape = batch["inputs_BSL"].shape
        rows = {name: batch[f"{name}_BSL"].reshape(-1, shape[-1]) for name in ("inputs", "positions", "segments")}
        x_BLD, _ = decoder.apply({"params": params}, rows["inputs"], rows["positions"], rows["segments"])
        targets_BL = batch["targets_BSL"].reshape(-1, shape[-1])
        softcap = decoder.cfg.logit_softcap
        log_p_BL, _ = token_log_probs(x_BLD, head(params), targets_BL, decoder.vocab_size, softcap)
        return (log_p_BL.reshape(shape) * batch["weights_BSL"]).sum(-1)

    return log_probs


class PreferenceEvaluation:
    """The terms of a preference loss on prompts that are held out, as eval_NAME with eval_NAME_stderr.

    The reference's log-probabilities are computed at the first call, and kept: an evaluation reads the policy alone.
    """

    def __init__(
        self, config: DpoConfig, decoder: Decoder, mesh: Mesh, params: Params, example: Batch, held: PromptRows
    ):
        self._config, self._mesh, self._held = config, mesh, held
        self._reference: list[jax.Array] = []
        log_probs = answer_log_probs(decoder)

        def terms(params: Params, batch: Batch, reference_BS: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
            ranks = batch["rank_BS"], batch["answers_BS"]
            return preference_terms(log_probs(params, batch), reference_BS, *ranks, config.beta, config.kind)

        placed = shardings(params, mesh), shardings(example, mesh)
        self._log_probs = jax.jit(log_probs, in_shardings=placed)
        self._terms = jax.jit(terms, in_shardings=(*placed, None))

    def __call__(self, params: Params, base: Params) -> dict[str, Any]:
        """Means over the prompts, and the standard errors of the mean of those that are named in `ERRORS`."""
        size, terms, there = self._config.data.batch_size, [], []
        rows = local_rows(size, self._mesh)
        for i, whole in enumerate(self._held.in_order(size, self._config.evaluate.max_rows)):
            batch = to_global({name: x[rows.numbers] for name, x in whole.items()}, self._mesh, rows)
            if i == len(self._reference):
                self._reference.append(self._log_probs(base, batch))
            terms_B, there_B = on_host(self._terms(params, batch, self._reference[i]))
            terms.append(terms_B)
            there.append(there_B)
        used = np.concatenate(there) > 0
        values = {name: np.concatenate([x[name] for x in terms])[used].astype(np.float64) for name in terms[0]}
        numbers: dict[str, Any] = {f"eval_{name}": float(x.mean()) for name, x in values.items()}
        if used.sum() > 1:
            errors = {
                n: values[n].std(ddof=1) / math.sqrt(used.sum())
                for n in ("loss", "accuracy", "margin", "ranking_accuracy")
            }
            numbers |= {f"eval_{name}_stderr": float(x) for name, x in errors.items()}
        return numbers | {"eval_prompts": int(used.sum())}

"""Rollouts: answers to prompts, drawn on the training mesh by the compiled decode loop, as rows that losses read.

A token is drawn with a key of (seed, step, number of the prompt, number of the answer, position), so that a run that
goes on draws what it would have drawn, whatever else is in the batch. Shapes follow from the settings and the longest
prompt alone: one program of each kind serves a whole run.

The log-probabilities that come with the answers are the sampler's. Those that a loss compares with are the training
program's own (`policy_log_probs`), so that the first ratio is 1; the gap between the two is a metric.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import RolloutConfig
from gptjax.data.packing import Batch
from gptjax.data.permutation import mix_integers
from gptjax.data.prompts import Prompt
from gptjax.generation.engine import decode, decode_params, drawable, prefill, repeat_rows
from gptjax.model.cache import grow, headroom, round_up_length
from gptjax.model.decoder import Decoder, Params, head
from gptjax.ops.decoding import decode_dtype
from gptjax.parallel.sharding import on_host
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of
from gptjax.training.losses import token_log_probs


class Rollout(NamedTuple):
    """Answers to prompts, the answers of a prompt side by side: B rows."""

    batch: Batch
    """inputs_BL, targets_BL, positions_BL and segments_BL as `packing.cut` has them, one answer behind its prompt a
    row, with no gap; mask_BL is 1.0 where the target is the answer's, its end included; sampled_log_p_BL, 0 elsewhere,
    is log p of these targets by the sampler, in nats; ended_B is True unless the answer was cut off."""
    texts: list[str]
    """The answers without the token that ends them."""
    ids: list[list[int]]
    """Prompt and answer, with the token that ends it."""


class Sampler:
    """Draws answers for one run: `decoder` as it trains, rows of `length` tokens, prompts of at most `longest`.

    Ids that no token has are never drawn; `vocab_size` counts the others, over which a policy's softmax goes.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, cfg: RolloutConfig, *, length: int, longest: int, seed: int
    ):
        self.cfg, self.length, self.longest, self.seed = cfg, length, longest, seed
        self.vocab_size = drawable(decoder, tokenizer)
        self._tokenizer, self._dtype = tokenizer, decode_dtype(decoder.cfg.dtype)
        anywhere = dataclasses.replace(decoder.cfg.anywhere(), dtype=self._dtype)
        self._decoder = decoder.clone(cfg=anywhere, vocab_size=self.vocab_size)
        self._stops, self._spaced = tokenizer.end_ids, False
        if tokenizer.template:
            template = template_of(tokenizer)
            self._stops, self._spaced = template.stop_ids(tokenizer), template.spaced(tokenizer)

    def draw(
        self, params: Params, prompts: Sequence[Prompt], *, first: int, step: int, answers: int | None = None
    ) -> Rollout:
        """`answers` (else those of the settings) to each prompt by whole weights, which lie as they are trained.

        The prompts have the numbers first, first + 1, ...: with the step they decide what is drawn. The weights are
        laid out for decoding once, and each prompt is read once for all of its answers.
        """
        weights = decode_params(params, self._dtype)
        answers, most = answers or self.cfg.answers, self.longest + self.cfg.max_new_tokens
        length_P = np.array([len(prompt.ids) for prompt in prompts], np.int32)
        assert length_P.max() <= self.longest, "programs are made for the longest prompt"
        prompt_PL = np.zeros((len(prompts), round_up_length(self.longest, self._decoder.context)), np.int32)
        for row, prompt in enumerate(prompts):
            prompt_PL[row, : len(prompt.ids)] = prompt.ids
        length_B = np.repeat(length_P, answers)
        number_B = (first * answers + np.arange(len(length_B))) % 2**31
        rows = {"copy_B": number_B.astype(np.int32), "last_B": length_B + self.cfg.max_new_tokens - 1}
        room = headroom(len(length_B))
        slots = round_up_length(min(self.longest + room, most), self._decoder.context)
        state = prefill(self._decoder, weights, prompt_PL, length_P, slots, False, keep_log_p=True)
        state = repeat_rows(state, answers)
        settings, seed = {"temperature": self.cfg.temperature}, np.uint32(mix_integers(self.seed, step) % 2**32)
        stops, none_B, filled = np.array(self._stops, np.int32), np.zeros(len(length_B), bool), self.longest
        while True:
            n = np.int32(slots - filled)
            state = decode(self._decoder, weights, state, rows, settings, seed, stops, none_B, n)
            filled = slots
            if filled >= most or on_host(state["done_B"]).all():
                break
            slots = round_up_length(min(filled + room, most), self._decoder.context)
            state = grow(state, slots)
        names = ("tokens_BM", "position_B", "log_p_BM")
        return self._rows(length_B, *on_host([state[name] for name in names]))

    def _rows(self, length_B: np.ndarray, tokens_BM: np.ndarray, last_B: np.ndarray, log_p_BM: np.ndarray) -> Rollout:
        """The rollout of what was decoded: the last token of a row stands at last_B, its prompt has length_B tokens."""
        column_M = np.arange(min(tokens_BM.shape[1], self.length + 1))
        tokens_BM, log_p_BM = tokens_BM[:, : len(column_M)], log_p_BM[:, : len(column_M)]
        answer_BM = (column_M >= length_B[:, None]) & (column_M <= last_B[:, None])
        input_BL = (column_M < last_B[:, None])[:, :-1]

        def row(x_BL: np.ndarray, kept_BL: np.ndarray, kind: type) -> np.ndarray:
            whole_BL = np.zeros((len(x_BL), self.length), kind)
            whole_BL[:, : x_BL.shape[1]] = np.where(kept_BL, x_BL, 0)
            return whole_BL

        batch = {
            "inputs_BL": row(tokens_BM[:, :-1], input_BL, np.int32),
            "targets_BL": row(tokens_BM[:, 1:], input_BL, np.int32),
            "positions_BL": row(np.broadcast_to(column_M[:-1], input_BL.shape), input_BL, np.int32),
            "segments_BL": row(input_BL, input_BL, np.int32),
            "mask_BL": row(answer_BM[:, 1:], input_BL, np.float32),
            "sampled_log_p_BL": row(log_p_BM[:, 1:], answer_BM[:, 1:], np.float32),
            "ended_B": np.isin(tokens_BM[np.arange(len(last_B)), last_B], self._stops),
        }
        ids = [tokens[: last + 1].tolist() for tokens, last in zip(tokens_BM, last_B, strict=True)]
        drawn = [row[length : len(row) - ended] for row, length, ended in zip(ids, length_B, batch["ended_B"])]
        return Rollout(batch, [self._text(answer) for answer in drawn], ids)

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode_bytes(ids)
        return (text.removeprefix(b" ") if self._spaced else text).decode("utf-8", errors="replace")


def policy_log_probs(decoder: Decoder, vocab_size: int, temperature: float = 1.0) -> Callable:
    """Builds log_probs(params, frozen, batch) -> (log_p_BL, entropy_BL) of a batch's targets, in nats.

    It is the forward pass of training without dropout, over the first vocab_size ids, at the temperature that answers
    are drawn with: see `losses.policy_loss`. `params` are whole weights, or those joined with LoRA's leaves.
    """

    def log_probs(params: Params, frozen: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        del frozen
        inputs = (batch["inputs_BL"], batch["positions_BL"], batch["segments_BL"])
        x_BLD, _ = decoder.apply({"params": params}, *inputs)
        softmax = (vocab_size, decoder.cfg.logit_softcap, temperature)
        return token_log_probs(x_BLD, head(params), batch["targets_BL"], *softmax)

    return log_probs

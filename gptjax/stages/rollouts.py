"""On-policy data of a stage: answers of the policy as it is trained, their rewards, and what a step measures of them.

A step of such a stage is one rollout with all its updates, in one program: so every checkpoint lies between two
rollouts, holds nothing but the state, and a run that goes on draws the next one as it would have.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.align.advantages import masked_mean
from gptjax.align.objectives import kl_estimate
from gptjax.align.rollout import Rollout, Sampler
from gptjax.align.scoring import Answer, Rewards
from gptjax.config import PolicyConfig
from gptjax.data.batches import DataState
from gptjax.data.packing import Batch, example_batch
from gptjax.data.prompts import Prompt, PromptData
from gptjax.model.decoder import Params
from gptjax.parallel.sharding import constrain, local_rows, on_host, suffix, to_global
from gptjax.stages.tuning import Tuning
from gptjax.training.step import TrainState, micro_batches

LogProbs = Callable[..., tuple[jax.Array, ...]]
Measured = dict[str, jax.Array]

EVALUATION = -1  # the step whose random numbers evaluations share, so that they differ by the policy alone
SAMPLES = 8  # answers of an evaluation that the report shows


def example_rollout(config: PolicyConfig, rewards: Rewards) -> Batch:
    """Names, shapes and types of a rollout's batch with its rewards, with nothing drawn."""
    rows = config.data.batch_size
    batch = example_batch(rows, config.data.length)
    floats_BL = batch.pop("weights_BL")
    batch |= dict.fromkeys(("mask_BL", "sampled_log_p_BL"), floats_BL)
    names = ["reward_B", *(f"reward_{name}_B" for name in rewards.sources if name), "ended_B"]
    return batch | dict.fromkeys(names, np.broadcast_to(np.float32(0), rows))


def compared(
    policy: LogProbs, reference: LogProbs, params: Params, frozen: Any, batch: Measured, parts: int
) -> tuple[Measured, jax.Array]:
    """The batch with what an update compares with, and log_ratio_BL = log pi - log ref of the answers' tokens.

    That is old_log_p_BL and ref_log_p_BL, with a value function old_value_BL, and fresh_B: the policy, with the weights
    `params`, and the reference, with frozen["base"], read the rows by `parts` shares in turn.
    """
    old_BL, _, *values = in_parts(policy, params, frozen, batch, parts)
    ref_BL, *_ = in_parts(reference, frozen["base"], frozen, batch, parts)
    added = {"old_log_p_BL": old_BL, "ref_log_p_BL": ref_BL, "fresh_B": jnp.ones(len(old_BL))}
    added |= dict(zip(("old_value_BL",), values))
    return {**batch, **added}, (old_BL - ref_BL) * batch["mask_BL"]


def in_parts(log_probs: LogProbs, params: Params, frozen: Any, batch: Measured, parts: int) -> tuple[jax.Array, ...]:
    """log_probs(params, frozen, batch) by `parts` shares of the rows in turn: in the memory of an update.

    The barrier keeps XLA from sharing the forward pass of an update, whose rounding is another: so two policies of the
    same weights have the same numbers, and the KL of the first step is 0.
    """
    names = ("inputs_BL", "targets_BL", "positions_BL", "segments_BL")
    split = {name: micro_batches(batch[name], suffix(name), parts) for name in names}
    params, frozen, split = jax.lax.optimization_barrier((params, frozen, split))

    def one(part: Measured) -> tuple[jax.Array, ...]:
        return log_probs(params, frozen, {name: constrain(x, suffix(name)) for name, x in part.items()})

    results = jax.lax.map(one, split) if parts > 1 else [x[None] for x in one({n: x[0] for n, x in split.items()})]
    return tuple(constrain(jnp.moveaxis(x, 0, 1).reshape(-1, x.shape[-1]), "BL") for x in results)


def measures(batch: Mapping[str, jax.Array], log_ratio_BL: jax.Array) -> Measured:
    """Metrics of a rollout, whose policy has log_ratio_BL = log pi - log ref of the tokens.

    reward, reward_std and reward_NAME by source; kl_k2 and kl_k3 to the reference in nats an answer, kl_token,
    kl_k2_token and kl_k3_token in nats a token; length, the tokens of an answer; ended, the share of answers that were
    not cut off; log_p_gap and log_p_gap_max, |log p of training - log p of the sampler| of a token, in nats.
    """
    mask_BL, reward_B = batch["mask_BL"], batch["reward_B"]
    metrics = {"reward": reward_B.mean(), "reward_std": reward_B.std()}
    by_source = {name: x for name, x in batch.items() if name.startswith("reward_") and name != "reward_B"}
    metrics |= {name.removesuffix("_B"): x.mean() for name, x in by_source.items()}
    for kind in ("k1", "k2", "k3"):
        kl_BL = kl_estimate(log_ratio_BL * mask_BL, kind) * mask_BL
        if kind != "k1":  # an update measures that one: "kl"
            metrics[f"kl_{kind}"] = kl_BL.sum(-1).mean()
        metrics["kl_token" if kind == "k1" else f"kl_{kind}_token"] = masked_mean(kl_BL, mask_BL)
    metrics |= {"length": mask_BL.sum(-1).mean(), "ended": batch["ended_B"].mean()}
    gap_BL = jnp.abs(batch["old_log_p_BL"] - batch["sampled_log_p_BL"]) * mask_BL
    return metrics | {"log_p_gap": masked_mean(gap_BL, mask_BL), "log_p_gap_max": gap_BL.max()}


class Rollouts:
    """Batches as a function of the state, and evaluations: answers by the weights of the moment, with their rewards.

    `log_probs` is the policy's, see `align.rollout.policy_log_probs`; `cursor` is the state of the data to go on from.
    """

    def __init__(
        self, config: PolicyConfig, tuning: Tuning, data: PromptData, rewards: Rewards, log_probs: LogProbs,
        cursor: DataState,
    ):  # fmt: skip
        self.config, self.tuning, self.data, self.rewards, self.cursor = config, tuning, data, rewards, cursor
        length, longest = config.data.length, data.longest
        self.sampler = Sampler(
            tuning.decoder, data.tokenizer, config.rollout, length=length, longest=longest, seed=config.seed
        )
        self.rows = local_rows(config.data.batch_size, tuning.mesh)
        self.samples: list[dict[str, Any]] = []
        """Prompt, text and reward of the first answers of the last evaluation."""

        def log_ratio(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
            policy = tuning.joined(params, frozen)
            return log_probs(policy, frozen, batch)[0] - log_probs(frozen["base"], frozen, batch)[0]

        self._log_ratio = jax.jit(log_ratio)

    def __call__(self, state: TrainState) -> tuple[Batch, DataState]:
        """The answers of the next step, as `example_rollout` has them, and the state of the data behind it."""
        rows, answers = self.config.data.batch_size, self.config.rollout.answers
        first = self.cursor["rows"] // answers
        prompts = self.data.prompts(first, rows // answers)
        drawn = self.sampler.draw(self.tuning.whole(state.params), prompts, first=first, step=int(state.step) + 1)
        reward_B, by_source = self._score([p for p in prompts for _ in range(answers)], drawn)
        batch = drawn.batch | {"reward_B": reward_B} | {f"{name}_B": x_B for name, x_B in by_source.items()}
        batch["ended_B"] = batch["ended_B"].astype(np.float32)
        self.cursor = {**self.cursor, "rows": self.cursor["rows"] + rows}
        return {name: x[self.rows.numbers] for name, x in batch.items()}, self.cursor

    def evaluate(self, state: TrainState, frozen: Any) -> dict[str, float]:
        """Means over one answer to each held-out prompt (evaluate.max_rows of them), drawn as those of training are.

        eval_reward, its standard error eval_reward_stderr, eval_reward_NAME by source, eval_kl and eval_kl_k3 to the
        reference in nats an answer, eval_length, eval_ended, and eval_loss = beta eval_kl - eval_reward: the negative
        of what is maximised.
        """
        params, size, mesh = state.eval_params, self.config.data.batch_size, self.tuning.mesh
        weights = self.tuning.whole(params)
        held = self.data.held[: self.config.evaluate.max_rows or None]
        values: dict[str, list[np.ndarray]] = {}
        self.samples = []
        for first in range(0, len(held), size):
            prompts = held[first : first + size]
            padded = [*prompts, *[prompts[-1]] * (size - len(prompts))]
            drawn = self.sampler.draw(weights, padded, first=first, step=EVALUATION, answers=1)
            reward_B, by_source = self._score(prompts, drawn)
            local = {name: x[self.rows.numbers] for name, x in drawn.batch.items()}
            mask_BL = drawn.batch["mask_BL"]
            ratio_BL = on_host(self._log_ratio(params, frozen, to_global(local, mesh, self.rows))) * mask_BL
            found = {"reward": reward_B, "kl": ratio_BL.sum(-1), "length": mask_BL.sum(-1)} | by_source
            found |= {"kl_k3": (np.expm1(-ratio_BL) + ratio_BL).sum(-1), "ended": drawn.batch["ended_B"]}
            for name, x_B in found.items():
                values.setdefault(name, []).append(x_B[: len(prompts)])
            for prompt, text, reward in zip(prompts[: SAMPLES - len(self.samples)], drawn.texts, reward_B):
                self.samples.append({"prompt": prompt.text, "text": text, "reward": round(float(reward), 4)})
        means = {f"eval_{name}": float(np.mean(np.concatenate(x))) for name, x in values.items()}
        reward_B = np.concatenate(values["reward"])
        if len(reward_B) > 1:
            means["eval_reward_stderr"] = float(reward_B.std(ddof=1) / len(reward_B) ** 0.5)
        return {"eval_loss": self.config.beta * means["eval_kl"] - means["eval_reward"]} | means

    def _score(self, prompts: Sequence[Prompt], drawn: Rollout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        ended = drawn.batch["ended_B"].tolist()
        rows = zip(prompts, drawn.texts, ended, drawn.ids)
        return self.rewards([Answer(p.record, text, end, ids, p.origin) for p, text, end, ids in rows])

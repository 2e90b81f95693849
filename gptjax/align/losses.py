"""Loss functions of the alignment stages, as `make_train_step` takes them: loss_fn(params, frozen, batch, key).

They know no model: each is given the functions of (params, frozen, batch) that compute log-probabilities, values or
scores. A rollout's numbers lie in the batch, as the policy that drew the answers gave them: mask_BL (1 at the answer's
tokens), old_log_p_BL, ref_log_p_BL, advantage_BL, and with a value function old_value_BL and return_BL.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.align.advantages import masked_mean
from gptjax.align.estimators import Aggregation, aggregate
from gptjax.align.objectives import KL, better_than, clipped, clipped_value, dpo, ipo, kl_estimate, pairwise
from gptjax.training.step import LossFn

Batch = dict[str, jax.Array]
# log_p_BL of the tokens drawn and entropy_BL; with a value function value_BL as well, which may share the forward pass.
LogProbs = Callable[[Any, Any, Batch], tuple[jax.Array, ...]]
Values = Callable[[Any, Any, Batch], jax.Array]


def policy_loss(
    log_probs: LogProbs,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    aggregation: Aggregation = "row_sum",
    beta: float = 0.0,
    kl: KL | None = None,
    entropy: float = 0.0,
    value_clip: float = 0.2,
    value_weight: float = 0.1,
) -> LossFn:
    """The clipped policy gradient, plus beta times an estimate of the KL, minus entropy times the policy's entropy.

    Where log_probs gives values as well (PPO's critic), plus value_weight times the clipped value loss, a mean over
    tokens. Metrics: policy_loss, kl (k1 to the reference, nats an answer), kl_old (k3 to the policy of the rollout,
    nats a token), clip_fraction, ratio_max, entropy, and value_loss.
    """

    def loss_fn(params: Any, frozen: Any, batch: Batch, key: jax.Array):
        del key  # no dropout: it would make the ratio of the first step differ from 1
        mask_BL, old_BL, advantage_BL = batch["mask_BL"], batch["old_log_p_BL"], batch["advantage_BL"]
        log_p_BL, entropy_BL, *values = log_probs(params, frozen, batch)
        log_ratio_BL = (log_p_BL - old_BL) * mask_BL  # 0 outside of the answer, where exp could overflow
        token_BL = clipped(log_ratio_BL, advantage_BL, clip, clip_high)
        policy, weight = aggregate(token_BL, mask_BL, aggregation)
        to_ref_BL = (log_p_BL - batch["ref_log_p_BL"]) * mask_BL
        loss = policy
        if kl is not None:
            loss += beta * aggregate(kl_estimate(to_ref_BL, kl), mask_BL, aggregation)[0]
        if entropy:
            loss -= entropy * aggregate(entropy_BL, mask_BL, aggregation)[0]
        ratio_BL = jnp.exp(log_ratio_BL)
        outside_BL = (ratio_BL < 1 - clip) | (ratio_BL > 1 + (clip if clip_high is None else clip_high))
        metrics = {
            "policy_loss": policy,
            "kl": aggregate(to_ref_BL, mask_BL, "row_sum")[0],
            "kl_old": masked_mean(kl_estimate(-log_ratio_BL, "k3"), mask_BL),
            "clip_fraction": masked_mean(outside_BL.astype(jnp.float32), mask_BL),
            "ratio_max": jnp.where(mask_BL > 0, ratio_BL, 0).max(),
            "entropy": masked_mean(entropy_BL, mask_BL),
        }
        if values:
            errors_BL = clipped_value(values[0], batch["old_value_BL"], batch["return_BL"], value_clip)
            metrics["value_loss"] = masked_mean(errors_BL, mask_BL)
            loss += value_weight * metrics["value_loss"]
        return loss, {"loss": loss, "weight": weight} | metrics

    return loss_fn


def preference_loss(log_probs: Values, reference: Values, *, beta: float, kind: str = "dpo") -> LossFn:
    """DPO's or IPO's mean over pairs; both functions give log_p_BS of whole answers, the better first (S = 2).

    Metrics: accuracy (the implicit reward beta log pi / ref prefers the better), margin, and each answer's implicit
    reward.
    """
    objective = {"dpo": dpo, "ipo": ipo}[kind]

    def loss_fn(params: Any, frozen: Any, batch: Batch, key: jax.Array):
        del key
        reward_BS = log_probs(params, frozen, batch) - jax.lax.stop_gradient(reference(params, frozen, batch))
        margin_B = reward_BS[:, 0] - reward_BS[:, 1]
        loss = objective(margin_B, beta).mean()
        chosen, rejected = beta * reward_BS.mean(0)
        metrics = {"accuracy": (margin_B > 0).mean(), "margin": beta * margin_B.mean()}
        metrics |= {"reward_chosen": chosen, "reward_rejected": rejected}
        return loss, {"loss": loss, "weight": jnp.float32(len(margin_B))} | metrics

    return loss_fn


def reward_loss(scores: Values) -> LossFn:
    """The pairwise loss of a reward model: mean over prompts of all pairs of their answers (rank_BS, mask_BS).

    Metrics: accuracy, the share of each prompt's pairs whose scores are in the right order.
    """

    def loss_fn(params: Any, frozen: Any, batch: Batch, key: jax.Array):
        del key
        score_BS, rank_BS, mask_BS = scores(params, frozen, batch), batch["rank_BS"], batch["mask_BS"]
        loss_B, pairs_B = pairwise(score_BS, rank_BS, mask_BS)
        right_BSS = (score_BS[:, :, None] > score_BS[:, None, :]) * better_than(rank_BS, mask_BS)
        right_B = right_BSS.sum((1, 2)) / jnp.maximum(pairs_B, 1.0)
        weight = (pairs_B > 0).sum().astype(jnp.float32)
        loss = loss_B.sum() / jnp.maximum(weight, 1.0)
        return loss, {"loss": loss, "weight": weight, "accuracy": right_B.sum() / jnp.maximum(weight, 1.0)}

    return loss_fn

"""Loss functions of the alignment stages, as `make_train_step` takes them: loss_fn(params, frozen, batch, key).

They know no model: each is given the functions of (params, frozen, batch) that compute log-probabilities, values or
scores. A rollout's numbers lie in the batch, as the policy that drew the answers gave them: mask_BL (1 at the answer's
tokens), old_log_p_BL, ref_log_p_BL, advantage_BL, and with a value function old_value_BL and return_BL. Where fresh_B
is 1 the parameters are still those of that policy, and the ratio is 1 by construction.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gptjax.align.advantages import masked_mean
from gptjax.align.estimators import Aggregation, aggregate
from gptjax.align.objectives import KL, better_than, clipped, clipped_value, dpo_loss, ipo_loss, kl_estimate, pairwise
from gptjax.training.step import LossFn

Batch = dict[str, jax.Array]
# log_p_BL of the tokens drawn and entropy_BL; with a value function value_BL as well, which may share the forward pass.
LogProbs = Callable[[Any, Any, Batch], tuple[jax.Array, ...]]
Values = Callable[[Any, Any, Batch], jax.Array]
PreferenceKind = Literal["dpo", "ipo"]


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
        now_BL = log_p_BL
        if "fresh_B" in batch:  # else rounding would tell apart two programs of one forward pass
            fresh_B1 = batch["fresh_B"][:, None] > 0
            now_BL = jnp.where(fresh_B1, old_BL, log_p_BL)
            old_BL = jnp.where(fresh_B1, jax.lax.stop_gradient(log_p_BL), old_BL)
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
            "kl": aggregate((now_BL - batch["ref_log_p_BL"]) * mask_BL, mask_BL, "row_sum")[0],
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


def preference_loss(log_probs: Values, reference: Values, *, beta: float, kind: PreferenceKind = "dpo") -> LossFn:
    """DPO's or IPO's mean over prompts of all pairs of their answers; rank_BS, and answers_BS 1 where there is one.

    Both functions give log_p_BS of whole answers. Metrics: those of `preference_terms`, as means over prompts.
    """

    def loss_fn(params: Any, frozen: Any, batch: Batch, key: jax.Array):
        del key  # no dropout: it would move the margin of the first step away from 0
        reference_BS = jax.lax.stop_gradient(reference(params, frozen, batch))
        log_p_BS, ranks = log_probs(params, frozen, batch), (batch["rank_BS"], batch["answers_BS"])
        terms, there_B = preference_terms(log_p_BS, reference_BS, *ranks, beta, kind)
        weight = there_B.sum()
        metrics = {name: (x * there_B).sum() / jnp.maximum(weight, 1.0) for name, x in terms.items()}
        return metrics["loss"], metrics | {"weight": weight}

    return loss_fn


def preference_terms(
    log_p_BS: jax.Array,
    reference_BS: jax.Array,
    rank_BS: jax.Array,
    mask_BS: jax.Array,
    beta: float,
    kind: PreferenceKind = "dpo",
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The terms of a preference loss, each a number for every prompt, and 1 for prompts that have a pair, else 0.

    All pairs of a prompt's ranked answers are one element, of which these are means, as in `objectives.pairwise`: with
    two answers the one pair. r = beta log pi / ref is an answer's implicit reward.

        loss                              DPO's or IPO's
        accuracy                          1 where r prefers the better; equal counts as half
        margin                            r of the better - r of the worse
        reward_chosen, reward_rejected    r of the better, of the worse
        log_p_chosen, log_p_rejected      log pi of them, in nats an answer
        ranking_accuracy                  1 where pi alone gives the better the higher probability (Chen et al. 2024,
                                          arXiv:2405.19534)
        reference_ranking_accuracy        the same of the reference, where that of pi begins
        drift                             |log pi / ref| of an answer, in nats: a mean over the prompt's answers
    """
    objective = {"dpo": dpo_loss, "ipo": ipo_loss}[kind]
    better_BSS = better_than(rank_BS, mask_BS)
    pairs_B = better_BSS.sum((1, 2))

    def mean(x_BSS: jax.Array) -> jax.Array:
        return (x_BSS * better_BSS).sum((1, 2)) / jnp.maximum(pairs_B, 1.0)

    def right(x_BS: jax.Array) -> jax.Array:
        return mean((jnp.sign(x_BS[:, :, None] - x_BS[:, None, :]) + 1) / 2)

    def sides(x_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mean(x_BS[:, :, None]), mean(x_BS[:, None, :])

    ratio_BS = log_p_BS - reference_BS
    margin_BSS = ratio_BS[:, :, None] - ratio_BS[:, None, :]
    reward_chosen, reward_rejected = sides(beta * ratio_BS)
    log_p_chosen, log_p_rejected = sides(log_p_BS)
    terms = {
        "loss": mean(objective(margin_BSS, beta)),
        "accuracy": right(ratio_BS),
        "margin": beta * mean(margin_BSS),
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "log_p_chosen": log_p_chosen,
        "log_p_rejected": log_p_rejected,
        "ranking_accuracy": right(log_p_BS),
        "reference_ranking_accuracy": right(reference_BS),
        "drift": masked_mean(jnp.abs(ratio_BS), mask_BS, axis=1),
    }
    return terms, (pairs_B > 0).astype(jnp.float32)


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

"""Policy-gradient estimators by name: the advantages of a rollout, the KL's place, and what each converges to."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.align.advantages import gae, group_mean, leave_one_out, whiten, z_score
from gptjax.align.objectives import KL
from gptjax.align.rewards import penalised_scores, token_rewards

Aggregation = Literal["row_sum", "row_mean", "token"]
BASELINES = {"leave_one_out": leave_one_out, "group_mean": group_mean, "z_score": z_score}


@dataclass(frozen=True, kw_only=True)
class GroupEstimator:
    """Advantages from groups of answers to one prompt, without a value function; see `fixed_point` for its limit."""

    baseline: Literal["leave_one_out", "group_mean", "z_score"] = "leave_one_out"
    kl: Literal["reward", "k2", "k3", "k3+"] = "reward"
    """Place of the KL to the reference: in the reward, or as a term of the loss by that estimate."""
    aggregate: Aggregation = "row_sum"
    """Mean over answers of the sum over their tokens, or of the mean over them; or mean over all tokens."""

    @property
    def kl_in_loss(self) -> KL | None:
        """The estimate that the loss adds, None where the KL is in the reward."""
        return None if self.kl == "reward" else self.kl

    def advantages(
        self, score_B: jax.Array, log_ratio_BL: jax.Array, mask_BL: jax.Array, answers: int, beta: float
    ) -> jax.Array:
        """advantage_BL, the same at each token of an answer; the `answers` rows of a prompt lie side by side.

        log_ratio_BL is log pi - log ref of the policy that drew the answers.
        """
        reward_B = penalised_scores(score_B, log_ratio_BL, mask_BL, beta if self.kl == "reward" else 0.0)
        advantage_BS = BASELINES[self.baseline](reward_B.reshape(-1, answers))
        return advantage_BS.reshape(-1, 1) * mask_BL

    @property
    def fixed_point(self) -> str:
        """The policy that the estimator converges to, in a line; G is the number of answers of a prompt."""
        if self.kl == "reward":
            return "ref exp(r / beta) / Z, the optimum of E[r] - beta KL(pi || ref)"
        if self.baseline == "z_score":
            return (
                "not the KL optimum: the KL weighs beta std(r), and below some beta the policy collapses to one answer"
            )
        effective = "beta" if self.baseline == "leave_one_out" else "beta G / (G - 1)"
        if self.kl == "k3":
            return f"b ref / (lambda - r) with b = {effective}, for answers of one token: KL(ref || pi) is penalised"
        return f"ref exp(r / b) / Z with b = {effective}, for answers of one token; in longer ones each token's term " \
               f"leaves out the KL of those behind it"  # fmt: skip


GROUP_ESTIMATORS = {
    "rloo": GroupEstimator(),
    "grpo": GroupEstimator(baseline="z_score", kl="k3", aggregate="row_mean"),
    "dr_grpo": GroupEstimator(baseline="group_mean", kl="k3"),
}
"""rloo: leave-one-out, the KL in the reward (Ahmadian et al. 2024); grpo: as published (Shao et al. 2024, eq. 3);
dr_grpo: without its divisions by length and spread (Liu et al. 2025)."""


@dataclass(frozen=True, kw_only=True)
class ActorCritic:
    """PPO's advantages (Schulman et al. 2017; Ouyang et al. 2022): GAE of token rewards with the KL in them.

    Fixed point: the optimum of E[r] - beta KL(pi || ref), for a value function that has converged.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    def advantages(
        self, score_B: jax.Array, log_ratio_BL: jax.Array, value_BL: jax.Array, mask_BL: jax.Array, beta: float
    ) -> tuple[jax.Array, jax.Array]:
        """(advantage_BL, return_BL) of a rollout; value_BL is that of the value function when it was drawn."""
        reward_BL = token_rewards(score_B, log_ratio_BL, mask_BL, beta)
        if self.whiten_rewards:
            reward_BL = whiten(reward_BL, mask_BL, shift_mean=False)
        advantage_BL, return_BL = gae(reward_BL, value_BL, mask_BL, self.gamma, self.lam)
        return whiten(advantage_BL, mask_BL) if self.whiten_advantages else advantage_BL, return_BL


def aggregate(x_BL: jax.Array, mask_BL: jax.Array, kind: Aggregation) -> tuple[jax.Array, jax.Array]:
    """(mean, weight) of a token's loss: see `Aggregation`; the weight counts the rows with tokens, or the tokens.

    row_sum is the gradient of a whole answer's log-probability. row_mean weighs a long answer's tokens less, so that
    among wrong answers long ones are pushed down less (Liu et al. 2025).
    """
    length_B = mask_BL.sum(-1)
    if kind == "token":
        return (x_BL * mask_BL).sum() / jnp.maximum(length_B.sum(), 1.0), length_B.sum()
    row_B = (x_BL * mask_BL).sum(-1) / (jnp.maximum(length_B, 1.0) if kind == "row_mean" else 1.0)
    rows = (length_B > 0).sum().astype(jnp.float32)
    return row_B.sum() / jnp.maximum(rows, 1.0), rows

"""Objectives, as functions of log-probabilities and scores that return a loss for each row or token, to be minimised.

pi is the policy, ref the reference, old the policy that drew the answers; y_w is the better and y_l the worse of two
answers. B rows, L tokens, S answers of one prompt. Log-probabilities are in nats.
"""

from typing import Literal

import jax
import jax.numpy as jnp

KL = Literal["k1", "k2", "k3", "k3+"]


def pairwise(score_BS: jax.Array, rank_BS: jax.Array, mask_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All pairs of a prompt's ranked answers in one element (Ouyang et al. 2022, eq. 1): (loss_B, pairs_B).

        loss = -1 / C(K, 2) sum over pairs of log sigmoid(r_w - r_l)

    rank_BS is lower for better answers; equal ranks make no pair, nor do answers whose mask is 0, and a prompt without
    pairs has loss 0. Fixed point: P(w > l) = sigmoid(r_w - r_l), so r up to a constant of each prompt (Bradley-Terry).
    """
    better_BSS = better_than(rank_BS, mask_BS)
    margin_BSS = score_BS[:, :, None] - score_BS[:, None, :]
    pairs_B = better_BSS.sum((1, 2))
    return -(better_BSS * jax.nn.log_sigmoid(margin_BSS)).sum((1, 2)) / jnp.maximum(pairs_B, 1.0), pairs_B


def better_than(rank_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """1 at [b, i, j] where answer i of prompt b ranks before answer j, and both are there."""
    return (rank_BS[:, :, None] < rank_BS[:, None, :]) * mask_BS[:, :, None] * mask_BS[:, None, :]


def dpo_loss(margin_B: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta margin), margin = log pi(y_w) / ref(y_w) - log pi(y_l) / ref(y_l) (Rafailov et al. 2023).

    Fixed point, for preferences that follow Bradley-Terry with reward r: pi = ref exp(r / beta) / Z, on the answers
    that occur in pairs. Pairs that always go one way have none: the margin grows without end.
    """
    return -jax.nn.log_sigmoid(beta * margin_B)


def ipo_loss(margin_B: jax.Array, beta: float) -> jax.Array:
    """(margin - 1 / (2 beta))^2, with DPO's margin (Azar et al. 2024, eq. 17).

    Fixed point: for a pair that is won with probability p, margin = (p - 1/2) / beta; always won, 1 / (2 beta). So it
    is finite where DPO's is not.
    """
    return (margin_B - 1 / (2 * beta)) ** 2


def clipped(log_ratio: jax.Array, advantage: jax.Array, clip: float, clip_high: float | None = None) -> jax.Array:
    """-min(q A, clip(q, 1 - clip, 1 + clip_high) A) with q = pi / old = exp(log_ratio) (PPO; Schulman et al. 2017).

    clip_high is clip unless given (clip-higher; Yu et al. 2025, DAPO). At q = 1 the gradient is -A grad log pi, so the
    fixed point is that of the advantages: clipping bounds steps and has none of its own.
    """
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -jnp.minimum(ratio * advantage, bounded * advantage)


def clipped_value(value: jax.Array, old: jax.Array, target: jax.Array, clip: float) -> jax.Array:
    """0.5 max((V - R)^2, (V_clip - R)^2), V_clip = old + clip(V - old, -clip, clip) (Baselines' PPO2; InstructGPT).

    Fixed point: V = E[R], reached in steps of at most `clip` a rollout.
    """
    bounded = old + jnp.clip(value - old, -clip, clip)
    return 0.5 * jnp.maximum((value - target) ** 2, (bounded - target) ** 2)


def kl_estimate(log_ratio: jax.Array, kind: KL) -> jax.Array:
    """An estimate of KL(pi || ref) from a token drawn from pi, with log_ratio = log pi - log ref (Schulman 2020).

        k1 = log_ratio    k2 = log_ratio^2 / 2    k3 = exp(-log_ratio) - 1 + log_ratio

    As values k1 and k3 are unbiased, and k3 is never negative. As a term of the loss what counts is the expected
    gradient, and hence the fixed point of max E[r] - beta (the term):

        k1   0: the gradient of sum pi = 1. No KL at all; the reward alone is maximised
        k2   that of KL(pi || ref): the optimum ref exp(r / beta) / Z
        k3   that of KL(ref || pi): pi = beta ref / (lambda - r), lambda such that it sums to 1
        k3+  the value of k3, the gradient of k2
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    k3 = jnp.expm1(-log_ratio) + log_ratio
    if kind == "k3":
        return k3
    k2 = 0.5 * log_ratio**2
    return jax.lax.stop_gradient(k3 - k2) + k2

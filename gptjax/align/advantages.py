"""Advantages: from the rewards of answers to the factor of each token's log-probability in the gradient.

A baseline that does not depend on the answer itself leaves the expected gradient, and so the fixed point, as it is; one
that does changes it by a factor that is stated with each function. B rows, L tokens, S answers of one prompt.
"""

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Mean of x over the places where mask is 1; 0 where there are none."""
    return (x * mask).sum(axis) / jnp.maximum(mask.sum(axis), 1.0)


def masked_var(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Unbiased variance over the places where mask is 1: sum (x - mean)^2 / (n - 1); 0 for fewer than two."""
    squares = (((x - masked_mean(x, mask)) * mask) ** 2).sum()
    return squares / jnp.maximum(mask.sum() - 1.0, 1.0)


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True, epsilon: float = 1e-8) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) over the masked places, 0 elsewhere; without shift_mean the mean stays.

    Advantages are whitened with a shift, rewards without one, which would take away their sign (Huang et al. 2024, The
    N+ Implementation Details of RLHF with PPO). Fixed point: that of the objective, since the whole batch's gradient
    has one positive factor; but its noise no longer shrinks near the optimum, so the learning rate has to.
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * jax.lax.rsqrt(masked_var(x, mask) + epsilon)
    return (white if shift_mean else white + mean) * mask


def gae(
    reward_BL: jax.Array, value_BL: jax.Array, mask_BL: jax.Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016): (advantage_BL, return_BL), 0 outside the mask.

        delta_t = r_t + gamma V_t' - V_t,  A_t = delta_t + gamma lam A_t',  return_t = A_t + V_t

    where t' is the next masked token, behind any gap (an observation, a tool's output); there V and A are 0 after the
    last. Fixed point: with lam = 1 or a right value function that of the exact policy gradient; else the value's error
    shifts it.
    """

    def backward(carry, at):
        next_B, later_B = carry
        reward_B, value_B, mask_B = at
        advantage_B = reward_B + gamma * next_B - value_B + gamma * lam * later_B
        carry = jnp.where(mask_B > 0, value_B, next_B), jnp.where(mask_B > 0, advantage_B, later_B)
        return carry, advantage_B * (mask_B > 0)

    zero_B = jnp.zeros(len(reward_BL), jnp.float32)
    columns = (reward_BL.T, value_BL.T, mask_BL.T)
    advantage_BL = jax.lax.scan(backward, (zero_B, zero_B), columns, reverse=True)[1].T
    return advantage_BL, (advantage_BL + value_BL) * (mask_BL > 0)


def leave_one_out(reward_BS: jax.Array) -> jax.Array:
    """r_i minus the mean of the other S - 1 answers of its prompt (RLOO; Kool et al. 2019, Ahmadian et al. 2024).

    Fixed point: that of the objective, as the baseline does not hold the own answer. One answer has no others: S >= 2.
    """
    S = reward_BS.shape[-1]
    assert S > 1, "leave-one-out needs two answers of a prompt"
    return (reward_BS - reward_BS.mean(-1, keepdims=True)) * (S / (S - 1))


def group_mean(reward_BS: jax.Array) -> jax.Array:
    """r_i minus the mean of all S answers of its prompt, its own too (Dr. GRPO; Liu et al. 2025).

    The own answer in the baseline makes the expected gradient of the reward (S - 1) / S of the true one. Alone that is
    a smaller learning rate; with a KL term of weight beta in the loss the fixed point is that of beta S / (S - 1).
    """
    return reward_BS - reward_BS.mean(-1, keepdims=True)


def z_score(reward_BS: jax.Array, epsilon: float = 1e-4) -> jax.Array:
    """(r_i - mean) / (std + epsilon) over the S answers of a prompt (GRPO; Shao et al. 2024); std divides by S - 1.

    The factor 1 / std weighs prompts by how much their answers agree. With the KL in the reward an interior optimum
    stays a fixed point (every group's spread is 0 there). With a KL term in the loss its weight against the reward is
    beta std, which goes to 0 as the policy sharpens: for small beta there is no interior fixed point at all.
    """
    S = reward_BS.shape[-1]
    assert S > 1, "a standard deviation needs two answers of a prompt"
    return group_mean(reward_BS) / (reward_BS.std(-1, ddof=1, keepdims=True) + epsilon)


def explained_variance(value_BL: jax.Array, return_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """1 - var(return - value) / var(return) over the masked tokens: 1 for perfect values, 0 for a constant."""
    return 1 - masked_var(return_BL - value_BL, mask_BL) / jnp.maximum(masked_var(return_BL, mask_BL), 1e-12)

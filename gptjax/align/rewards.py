"""Rewards of whole answers and of their tokens: scores, the rule of the end of text, and the KL to a reference."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def end_of_text_rule(score_B: ArrayLike, ended_B: ArrayLike, fixed: float = -1.0) -> jax.Array:
    """The score where an answer ended by itself, `fixed` where it was cut off (Stiennon et al. 2020; "EOS trick").

    A reward model that never saw unfinished answers may like them; the fixed reward must lie below the usual score.
    """
    return jnp.where(ended_B, score_B, fixed)


def last_token(mask_BL: jax.Array) -> jax.Array:
    """1 at the last masked token of each row, 0 elsewhere and in rows without one: where an answer's score belongs."""
    later_BL = jnp.cumsum(mask_BL[:, ::-1], axis=1)[:, ::-1] - mask_BL
    return mask_BL * (later_BL == 0)


def token_rewards(score_B: jax.Array, log_ratio_BL: jax.Array, mask_BL: jax.Array, beta: float) -> jax.Array:
    """r_t = -beta (log pi - log ref)_t, plus the score at the last token (Ziegler et al. 2019), 0 outside the mask.

    log_ratio_BL is that of the policy that drew the answers, a constant. Fixed point of any policy gradient with an
    unbiased baseline: max E[score] - beta KL(pi || ref), which is

        pi(y) = ref(y) exp(score(y) / beta) / Z
    """
    return (score_B[:, None] * last_token(mask_BL) - beta * log_ratio_BL) * mask_BL


def penalised_scores(score_B: jax.Array, log_ratio_BL: jax.Array, mask_BL: jax.Array, beta: float) -> jax.Array:
    """score - beta sum_t (log pi - log ref)_t: the sum of `token_rewards`, one number an answer. The same optimum."""
    return token_rewards(score_B, log_ratio_BL, mask_BL, beta).sum(-1)


def adapted_beta(beta: ArrayLike, kl: ArrayLike, target: float, rows: int, horizon: int = 10_000) -> jax.Array:
    """The next weight of the KL: beta (1 + clip(kl / target - 1, -0.2, 0.2) rows / horizon) (Ziegler et al. 2019, 2.2).

    kl is the mean of this batch, in nats an answer, over `rows` answers. It is fixed where kl is the target: at the
    optimum of the beta that gives that KL.
    """
    return jnp.asarray(beta) * (1 + jnp.clip(jnp.asarray(kl) / target - 1, -0.2, 0.2) * rows / horizon)

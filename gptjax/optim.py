"""Schedules and optimizers. What decays is decided by a parameter's letters, never by its number of dimensions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.config import OptimConfig
from gptjax.sharding import suffix

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(cfg: OptimConfig, steps: int) -> Schedule:
    """Learning rate of update u = 0, 1, ..., for a run of `steps` updates.

    It rises as (u + 1) / warmup_steps. Then cosine falls along half a cosine, and wsd stays and falls along a straight
    line in its last decay_fraction (Hu et al. 2024, MiniCPM); both end at final_fraction of the peak.
    """

    def schedule(u: jax.typing.ArrayLike) -> jax.Array:
        u = jnp.asarray(u, jnp.float32)
        warm = jnp.minimum(1.0, (u + 1) / max(cfg.warmup_steps, 1))
        if cfg.schedule == "cosine":
            done = (u - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1)
            fall = 0.5 * (1 - jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        else:
            length = max(steps * cfg.decay_fraction, 1)
            fall = jnp.clip((u - (steps - length)) / length, 0, 1)
        return cfg.learning_rate * warm * (1 - (1 - cfg.final_fraction) * fall)

    return schedule


def decays(name: str) -> bool:
    """True for matrices: the model's width D and one more dimension. Norms, biases and positions do not decay."""
    letters = suffix(name).replace("N", "")
    return "D" in letters and len(letters) > 1 and "T" not in letters


def decay_mask(params: Any) -> Any:
    """The tree of `decays` over parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path[-1].key), params)


def make_optimizer(cfg: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping the gradient to a global norm."""
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule, cfg.beta1, cfg.beta2, cfg.epsilon, weight_decay=cfg.weight_decay, mask=decay_mask
    )  # fmt: skip
    return optax.chain(clip, adamw)

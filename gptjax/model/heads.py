"""Heads beside the language model's: one number a token, read from the same hidden states, float32.

`score_D` is the reward model's, `value_D` the value function's. They are leaves beside the model's own, named like all
others, so that shardings, optimizers, digests and checkpoints know them; which ones a run has is `config.heads`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gptjax.model.block import Params


def init_heads(names: Sequence[str], width: int) -> Callable[[jax.Array], Params]:
    """Builds init(key) -> {name: head_D}: a score is normal with variance 1 / (width + 1), a value 0.

    Stiennon et al. 2020 (openai/summarize-from-feedback) start their reward head so.
    """

    def init(key: jax.Array) -> Params:
        starts = {"score_D": jax.random.normal(key, (width,)) / (width + 1) ** 0.5, "value_D": jnp.zeros(width)}
        return {name: starts[name] for name in names}

    return init


def add_heads(init: Callable[[jax.Array], Params], names: Sequence[str], width: int) -> Callable[[jax.Array], Params]:
    """Builds init(key) -> params with the heads among them; all other parameters are those of `init`, bit for bit."""
    heads = init_heads(names, width)
    return lambda key: init(key) | heads(jax.random.fold_in(key, 0))


def read_head(x_BLD: jax.Array, head_D: jax.Array) -> jax.Array:
    """float32 numbers_BL of hidden states."""
    return jnp.einsum("BLD,D->BL", x_BLD.astype(jnp.float32), head_D, precision="highest")

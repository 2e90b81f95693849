"""Heads beside the language model's: one number a token, read from the same hidden states.

`score_D` is the reward model's, `value_D` the value function's, and `value` LoRA's leaves of a trunk of its own. They
are leaves beside the model's, named like all others, so that shardings, optimizers, digests and checkpoints know them;
which ones a run has is `config.heads`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gptjax.config import PpoConfig, TrainConfig
from gptjax.model.block import Params
from gptjax.model.decoder import Decoder, hidden_states
from gptjax.model.lora import init_lora


def init_heads(names: Sequence[str], config: TrainConfig) -> Callable[[jax.Array], Params]:
    """Builds init(key) -> {name: head_D}: a score is normal with variance 1 / (width + 1), a value 0.

    Stiennon et al. 2020 (openai/summarize-from-feedback) start their reward head so.
    """

    width = config.model.width

    def init(key: jax.Array) -> Params:
        starts: Params = {"score_D": jax.random.normal(key, (width,)) / (width + 1) ** 0.5, "value_D": jnp.zeros(width)}
        if isinstance(config, PpoConfig) and config.value.rank:
            starts["value"] = init_lora(config.value.lora, config.model)(jax.random.fold_in(key, 1))
        return {name: starts[name] for name in names}

    return init


def add_heads(
    init: Callable[[jax.Array], Params], names: Sequence[str], config: TrainConfig
) -> Callable[[jax.Array], Params]:
    """Builds init(key) -> params with the heads among them; all other parameters are those of `init`, bit for bit."""
    heads = init_heads(names, config)
    return lambda key: init(key) | heads(jax.random.fold_in(key, 0))


def read_head(x_BLD: jax.Array, head_D: jax.Array) -> jax.Array:
    """float32 numbers_BL of hidden states."""
    return jnp.einsum("BLD,D->BL", x_BLD.astype(jnp.float32), head_D, precision="highest")


def answer_scores(decoder: Decoder, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 score_BS of the answers of rows, each read at its last token, ends_BS."""
    x_BLD, _ = hidden_states(decoder, params, batch)
    x_BSD = jnp.take_along_axis(x_BLD, batch["ends_BS"][..., None], axis=1)
    return read_head(x_BSD, params["score_D"])

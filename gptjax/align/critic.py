"""Policy and value function of PPO, from one forward pass or from two.

The value function reads the policy's own hidden states (a shared trunk), or has a trunk of its own: LoRA leaves beside
frozen weights, those of the policy's reference or of a reward model. So a value function that begins as the reward
model (Ouyang et al. 2022) costs neither a second copy of trained weights nor moments of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import PpoConfig, ValueConfig
from gptjax.config.section import InputError
from gptjax.data.batches import DataState
from gptjax.model.decoder import Decoder, Params, head
from gptjax.model.heads import read_head
from gptjax.model.lora import join_lora
from gptjax.runs.digest import tree_sha256
from gptjax.runs.load import load_model
from gptjax.tokenizer import Tokenizer
from gptjax.training.losses import token_log_probs
from gptjax.training.step import TrainState

Policy = Callable[[Params, Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]]


def actor_critic(decoder: Decoder, vocab_size: int, temperature: float, cfg: ValueConfig) -> Policy:
    """Builds policy(params, frozen, batch) -> (log_p_BL, entropy_BL, value_BL) of a batch's targets.

    `params` are whole weights with value_D among them. With cfg.rank the leaves of a trunk lie in params["value"], its
    weights in frozen["value"] (of a reward model) or frozen["base"], and value_D reads its states. A value is that
    before its target is drawn. No dropout; the first vocab_size ids are drawn from, at the temperature.
    """

    def policy(params: Params, frozen: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        inputs = (batch["inputs_BL"], batch["positions_BL"], batch["segments_BL"])
        x_BLD, _ = decoder.apply({"params": params}, *inputs)
        softmax = (vocab_size, decoder.cfg.logit_softcap, temperature)
        log_p_BL, entropy_BL = token_log_probs(x_BLD, head(params), batch["targets_BL"], *softmax)
        if cfg.rank:
            trunk = join_lora(frozen["value" if cfg.init else "base"], params["value"], cfg.lora.scale)
            x_BLD, _ = decoder.apply({"params": trunk}, *inputs)
        return log_p_BL, entropy_BL, read_head(x_BLD, params["value_D"])

    return policy


def begin_value(
    config: PpoConfig, tokenizer: Tokenizer, weights: Params, state: TrainState, cursor: DataState
) -> tuple[TrainState, DataState, dict[str, Params]]:
    """(state, state of the data, frozen) with the value function of config.value.init, a reward model, in them.

    A new state's value_D begins as that model's score_D; frozen["value"] holds its other weights, and the data's state
    its step and digest in "value". `weights` are the policy's, or their shapes. Raises InputError where it is no reward
    model, is not what it was, or has other tokens or shapes than the policy.
    """
    init = config.value.init
    if not init:
        return state, cursor, {}
    mark = cursor.get("value")
    model = load_model(init, config.mesh, mark["step"] if mark else 0, heads=("score_D",))
    params = dict(model.params)
    if model.tokenizer.sha256 != tokenizer.sha256:
        raise InputError(f"value.init={init!r} has another tokenizer than init={config.init!r}; wanted the same")
    score_D = params.pop("score_D")
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, weights):
        raise InputError(
            f"value.init={init!r} has weights of other shapes than init={config.init!r}; wanted a reward model that "
            "began from a run of the same model"
        )
    found = {"step": model.step, "sha256": tree_sha256(model.params)}
    if mark is None:
        began = state.params | {"value_D": jnp.copy(score_D)}  # each its own: the step gives its state's memory away
        averages = state.ema and state.ema | {"value_D": jnp.copy(score_D)}
        state = state.replace(params=began, ema=averages)  # pyright: ignore[reportAttributeAccessIssue]
    elif mark["sha256"] != found["sha256"]:
        raise InputError(
            f"value.init={init!r}: its weights at step {model.step} are not what they were; restore that run"
        )
    return state, {**cursor, "value": found}, {"value": params}

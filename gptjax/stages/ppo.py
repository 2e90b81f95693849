"""Proximal policy optimization, from a run and prompts to a policy of higher reward: read `ppo` from top to bottom."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.align.advantages import explained_variance
from gptjax.align.critic import actor_critic, begin_value
from gptjax.align.estimators import ActorCritic
from gptjax.align.losses import policy_loss
from gptjax.align.pretraining import PretrainingText, WithText, example_text
from gptjax.align.rewards import adapted_beta
from gptjax.align.rollout import policy_log_probs
from gptjax.align.scoring import Rewards
from gptjax.config import PpoConfig
from gptjax.data.prompts import PromptData
from gptjax.generation.engine import drawable
from gptjax.model.decoder import Decoder
from gptjax.parallel.processes import say
from gptjax.parallel.sharding import abstract
from gptjax.runs.run import Provenance
from gptjax.runtime.status import entry
from gptjax.stages.rollouts import Rollouts, compared, example_rollout, measures
from gptjax.stages.runner import Runner, join
from gptjax.stages.tuning import Tuning, reading
from gptjax.training.losses import language_model_loss
from gptjax.training.step import Beside, LossFn, TrainState, several_updates


def ppo(config: PpoConfig, provenance: Provenance) -> Path:
    """Trains the policy in config.init on rewards of its own answers, or goes on with it in config.run_dir.

    A step draws data.batch_size answers and makes its updates on them, of the policy and of a value function. Returns
    the run's folder. Raises InputError for bad input, and Interrupted after a signal or near the time limit, with
    everything saved.
    """
    with join(config, provenance) as group:
        mesh, config = group.mesh, group.config
        # -- Prompts, the sources of rewards, and with ptx.source pretraining text.
        with reading(config, "reading prompts") as (run, resumes):
            data = PromptData(config, run.data, training=True)
        config = dataclasses.replace(config, steps=data.steps)
        rewards = Rewards(config.rewards, config.mesh, data.tokenizer)
        text = PretrainingText(config, run, data.tokenizer, resumes=resumes) if config.ptx.source else None

        # -- Policy, value function, loss and step. The reference is frozen["base"]: the weights of config.init.
        rollout, value = config.rollout, config.value
        estimator = ActorCritic(
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            whiten_advantages=config.whiten_advantages,
        )

        def actor(decoder: Decoder) -> Any:
            return actor_critic(decoder, drawable(decoder, data.tokenizer), rollout.temperature, value)

        def loss(decoder: Decoder) -> LossFn:
            return policy_loss(
                actor(decoder),
                clip=config.clip,
                aggregation="token",
                value_clip=value.clip,
                value_weight=value.weight,
            )

        def beside(decoder: Decoder) -> Beside:
            return Beside("ptx", config.ptx.weight, language_model_loss(decoder))

        tuning = Tuning(config, mesh, loss, reference=True, beside=beside if text and config.ptx.weight else None)
        decoder, parts = tuning.decoder, rollout.minibatches * config.optim.accumulate
        policy = actor(decoder)
        log_probs = policy_log_probs(decoder, drawable(decoder, data.tokenizer), rollout.temperature)
        updates = several_updates(tuning.step, rollout.epochs, rollout.minibatches)

        def step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]):
            beta, mask_BL = state.controls["beta"], batch["mask_BL"]
            joined = tuning.joined(state.params, frozen)
            batch, ratio_BL = compared(policy, log_probs, joined, frozen, batch, parts)
            value_BL = batch["old_value_BL"]
            advantages = estimator.advantages(batch["reward_B"], ratio_BL, value_BL, mask_BL, beta)
            batch |= dict(zip(("advantage_BL", "return_BL"), advantages, strict=True))
            metrics = measures(batch, ratio_BL) | {"beta": beta}
            metrics["explained_variance"] = explained_variance(value_BL, batch["return_BL"], mask_BL)
            state, more = updates(state, frozen, batch)
            if config.target_kl:
                kl = ratio_BL.sum(-1).mean()
                beta = adapted_beta(beta, kl, config.target_kl, config.data.batch_size, config.horizon)
            return state.replace(controls={"beta": beta}), more | metrics  # pyright: ignore

        tuning.shapes = tuning.shapes.replace(controls=abstract({"beta": jnp.float32(0)}, mesh))  # pyright: ignore
        rows = example_rollout(config, rewards) | (example_text(config) if text else {})
        example = abstract(rows, mesh)
        group.describe_step(config, tuning.shapes, tuning.frozen_shapes)
        say(entry("data", data.describe()))

        # -- Run folder, and the state: a checkpoint comes before config.init.
        runner = Runner(group, config, provenance)
        runner.keep_tokenizer(data.tokenizer)
        state, cursor, frozen = tuning.begin(runner, data)
        state, cursor, trunk = begin_value(config, data.tokenizer, tuning.weight_shapes, state, cursor)
        frozen |= trunk
        if not state.controls:
            state = state.replace(controls={"beta": jnp.float32(config.beta)})  # pyright: ignore
        cursor = {"rewards": rewards.marks} | ({"ptx": text.data.start} if text else {}) | cursor
        rewards.check(cursor["rewards"])
        if text:
            text.data.check(cursor["ptx"])
        runner.run.write_settings(config, provenance)

        # -- Train.
        train_step = tuning.compile(step, frozen, example)
        rollouts = Rollouts(config, tuning, data, rewards, log_probs, cursor)
        batches = rollouts if text is None else WithText(rollouts, text, cursor, runner.rows)
        if isinstance(batches, WithText):
            group.cleanup.callback(batches.close)

        def evaluation(state: TrainState) -> dict[str, float]:
            of_text = text.evaluate(decoder, tuning.whole(state.eval_params), mesh) if text else {}
            return rollouts.evaluate(state, frozen) | of_text

        def samples(state: TrainState) -> list[dict[str, Any]]:
            del state  # the answers of the evaluation, which comes first
            return rollouts.samples

        # An answer is drawn, read by the policy, the reference and a trunk of the values, and updated with.
        update = tuning.passes * (2 if text and config.ptx.weight else 1) + (2 if value.rank else 0)
        passes = 3 + (1 if value.rank else 0) + rollout.epochs * update
        runner.train(train_step, state, frozen, batches, evaluation, samples, decoder.vocab_size, passes=passes)
    return run.folder

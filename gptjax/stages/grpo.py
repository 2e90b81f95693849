"""Group-relative policy optimization, from a run and prompts to a policy of higher reward: read `grpo` from the top."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.align.estimators import GROUP_ESTIMATORS
from gptjax.align.losses import policy_loss
from gptjax.align.rollout import policy_log_probs
from gptjax.align.scoring import Rewards
from gptjax.config import GrpoConfig
from gptjax.data.prompts import PromptData
from gptjax.model.decoder import Decoder
from gptjax.parallel.processes import say
from gptjax.parallel.sharding import abstract
from gptjax.runs.run import Provenance
from gptjax.runtime.status import entry
from gptjax.stages.rollouts import Rollouts, drawable, example_rollout, in_parts, measures
from gptjax.stages.runner import Runner, join
from gptjax.stages.tuning import Tuning, reading
from gptjax.training.step import LossFn, TrainState, several_updates


def grpo(config: GrpoConfig, provenance: Provenance) -> Path:
    """Trains the policy in config.init on rewards of its own answers, or goes on with it in config.run_dir.

    A step draws data.batch_size answers, rollout.answers to each prompt, and makes its updates on them. Returns the
    run's folder. Raises InputError for bad input, and Interrupted after a signal or near the time limit, with
    everything saved.
    """
    with join(config, provenance) as group:
        mesh, config = group.mesh, group.config
        # -- Prompts, in memory, and the sources of rewards.
        with reading(config, "reading prompts") as (run, resumes):
            data = PromptData(config, run.data, training=True)
        config = dataclasses.replace(config, steps=data.steps)
        rewards = Rewards(config.rewards, config.mesh, data.tokenizer)

        # -- Policy, loss and step. The reference is frozen["base"]: the weights of config.init.
        estimator, rollout = GROUP_ESTIMATORS[config.estimator], config.rollout

        def log_probs_of(decoder: Decoder) -> Any:
            return policy_log_probs(decoder, drawable(decoder, data.tokenizer), rollout.temperature)

        def loss(decoder: Decoder) -> LossFn:
            kl = {"beta": config.beta, "kl": estimator.kl_in_loss}
            return policy_loss(log_probs_of(decoder), clip=config.clip, aggregation=estimator.aggregate, **kl)

        tuning = Tuning(config, mesh, loss, reference=True)
        log_probs, parts = log_probs_of(tuning.decoder), rollout.minibatches * config.optim.accumulate
        updates = several_updates(tuning.step, rollout.epochs, rollout.minibatches)

        def step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]):
            mask_BL, policy = batch["mask_BL"], tuning.joined(state.params, frozen)
            old_BL, _ = in_parts(functools.partial(log_probs, policy, frozen), batch, parts)
            ref_BL, _ = in_parts(functools.partial(log_probs, frozen["base"], frozen), batch, parts)
            ratio_BL = (old_BL - ref_BL) * mask_BL
            drawn = {"old_log_p_BL": old_BL, "ref_log_p_BL": ref_BL, "fresh_B": jnp.ones(len(old_BL))}
            given = batch["reward_B"], ratio_BL, mask_BL, rollout.answers, config.beta
            drawn["advantage_BL"] = estimator.advantages(*given)
            metrics = measures(batch | drawn, ratio_BL) | {"beta": jnp.float32(config.beta)}
            state, more = updates(state, frozen, batch | drawn)
            return state, more | metrics

        example = abstract(example_rollout(config, rewards), mesh)
        group.describe_step(config, tuning.shapes, tuning.frozen_shapes)
        say(entry("data", data.describe()))
        say(entry("converges", f"{config.estimator}, to {estimator.fixed_point}"))

        # -- Run folder, and the state: a checkpoint comes before config.init.
        runner = Runner(group, config, provenance)
        runner.keep_tokenizer(data.tokenizer)
        state, cursor, frozen = tuning.begin(runner, data)
        rewards.check(cursor.setdefault("rewards", rewards.marks))
        runner.run.write_settings(config, provenance)

        # -- Train.
        train_step = tuning.compile(step, tuning.frozen_shapes, example)
        rollouts = Rollouts(config, tuning, data, rewards, log_probs, cursor)

        def evaluation(state: TrainState) -> dict[str, float]:
            return rollouts.evaluate(state, frozen)

        def samples(state: TrainState) -> list[dict[str, Any]]:
            del state  # the answers of the evaluation, which comes first
            return rollouts.samples

        vocab_size = tuning.decoder.vocab_size
        runner.train(train_step, state, frozen, rollouts, evaluation, samples, vocab_size=vocab_size)
    return run.folder

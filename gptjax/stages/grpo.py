"""Group-relative policy optimization, from a run and prompts to a policy of higher reward: read `grpo` from the top."""

import dataclasses
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
from gptjax.generation.engine import drawable
from gptjax.model.decoder import Decoder
from gptjax.parallel.processes import say
from gptjax.parallel.sharding import abstract
from gptjax.runs.run import Provenance
from gptjax.runtime.status import entry
from gptjax.stages.rollouts import Rollouts, compared, example_rollout, measures
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
            joined = tuning.joined(state.params, frozen)
            batch, ratio_BL = compared(log_probs, log_probs, joined, frozen, batch, parts)
            given = batch["reward_B"], ratio_BL, batch["mask_BL"], rollout.answers, config.beta
            batch["advantage_BL"] = estimator.advantages(*given)
            metrics = measures(batch, ratio_BL) | {"beta": jnp.float32(config.beta)}
            state, more = updates(state, frozen, batch)
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

        # An answer is drawn, read by the policy and by the reference, and updated with.
        work = {"vocab_size": tuning.decoder.vocab_size, "passes": 3 + rollout.epochs * tuning.passes}
        runner.train(train_step, state, frozen, rollouts, evaluation, samples, **work)
    return run.folder

"""Reward models, from a run and preferences to a run that scores answers: read `reward` from top to bottom."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from gptjax.align.losses import Batch, reward_loss
from gptjax.config import RewardConfig
from gptjax.data.pairs import PreferenceData
from gptjax.evals.preferences import (
    AnswerScorer,
    evaluate_preferences,
    make_score_step,
    read_scores,
    write_scores,
)
from gptjax.model.decoder import Decoder
from gptjax.model.heads import answer_scores
from gptjax.parallel.processes import barrier, is_main_process, say, working
from gptjax.parallel.sharding import abstract
from gptjax.runs.run import Provenance
from gptjax.runtime.status import entry
from gptjax.stages.runner import Runner, join
from gptjax.stages.tuning import Tuning, reading
from gptjax.training.step import LossFn, TrainState

MOST_DEMONSTRATIONS = 1024  # their mean is then known to 1/32 of the scores' standard deviation


def pairwise_loss(decoder: Decoder) -> LossFn:
    """-log sigmoid(better - worse), the mean over prompts of that over all pairs of their answers."""

    def scores(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        del frozen
        return answer_scores(decoder, params, batch)

    return reward_loss(scores)


def reward(config: RewardConfig, provenance: Provenance) -> Path:
    """Trains a reward model from the run in config.init into config.run_dir, or goes on, and returns its folder.

    The settings' model and tokenizer are those of config.init: see `init_check.with_init`. Raises InputError for bad
    input, and Interrupted after a signal or near the time limit, with everything saved.
    """
    with join(config, provenance) as group:
        mesh, config = group.mesh, group.config
        # -- Data, in memory: a row is a prompt with all its answers.
        with reading(config, "reading preferences") as (run, resumes):
            data = PreferenceData(config, run.data, training=True, trees=True)
            demonstrations = data.demonstrations(config.demonstrations, MOST_DEMONSTRATIONS)
        config = dataclasses.replace(config, steps=data.steps)
        batch_size = config.data.batch_size

        # -- Model, optimizer and step: the language model's weights, or LoRA's, and a head that starts at random.
        tuning = Tuning(config, mesh, pairwise_loss)
        example = abstract(jax.eval_shape(functools.partial(data.train.lay_out, [None] * batch_size)), mesh)
        group.describe_step(config, tuning.shapes, tuning.frozen_shapes)
        say(entry("data", data.describe()))

        # -- Run folder, and the state: a checkpoint comes before config.init.
        runner = Runner(group, config, provenance)
        runner.keep_tokenizer(data.tokenizer)
        state, cursor, frozen = tuning.begin(runner, data)
        runner.run.write_settings(config, provenance)

        # -- Train.
        train_step = tuning.compile(tuning.step, tuning.frozen_shapes, example)
        decoder, held = tuning.decoder, data.held
        held_example = abstract(jax.eval_shape(functools.partial(held.lay_out, [None] * batch_size)), mesh)
        score_step = make_score_step(decoder, mesh, tuning.whole_shapes, held_example)
        batches = group.cleanup.enter_context(contextlib.closing(data.batches(cursor, runner.rows.numbers)))

        tables: dict[int, Any] = {}

        def evaluation(state: TrainState) -> dict[str, float]:
            params, most = tuning.whole(state.eval_params), config.evaluate.max_rows
            metrics, table = evaluate_preferences(score_step, params, held, batch_size, most, mesh)
            tables[int(state.step)] = metrics | {"reliability": table}
            return metrics

        work = {"vocab_size": decoder.vocab_size, "passes": tuning.passes}
        state = runner.train(train_step, state, frozen, batches, evaluation, lambda state: "", **work)

        # -- Normalise: a score says more or less than a demonstration's. The loss knows no such number.
        if read_scores(run).get("step") != config.steps:
            with working("scoring demonstrations"):
                scores = AnswerScorer(decoder, tuning.whole(state.eval_params), mesh)(demonstrations)
                if config.steps not in tables:  # evaluated before a restart
                    evaluation(state)
            if is_main_process():
                write_scores(run, config.steps, scores, tables[config.steps])
                runner.report()
            barrier("normalised")
    return run.folder

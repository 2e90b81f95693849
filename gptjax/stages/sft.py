"""Supervised fine-tuning, from a run and conversations to a run that answers: read `sft` from top to bottom."""

import contextlib
import dataclasses
from pathlib import Path

from gptjax.config import SftConfig
from gptjax.data.chats import ChatData
from gptjax.evals.during import measure_tasks, named_tasks
from gptjax.evals.loss import evaluate, make_eval_step
from gptjax.parallel.processes import say
from gptjax.parallel.sharding import abstract
from gptjax.runs.run import Provenance
from gptjax.runtime.status import entry
from gptjax.stages.runner import Runner, join
from gptjax.stages.tuning import SampleAnswer, Tuning, reading
from gptjax.training.step import TrainState


def sft(config: SftConfig, provenance: Provenance) -> Path:
    """Fine-tunes the run in config.init into config.run_dir, or goes on with it there, and returns its folder.

    The settings' model and tokenizer are those of config.init: see `init_check.with_init`. Raises InputError for bad
    input, and Interrupted after a signal or near the time limit, with everything saved.
    """
    with join(config, provenance) as group:
        mesh, config = group.mesh, group.config
        # -- Data, in memory: from it follow the steps, and from these the schedule.
        with reading(config, "reading conversations") as (run, resumes):
            data = ChatData(config, run.data, training=True, resumes=resumes)
        config = dataclasses.replace(config, steps=data.steps)

        # -- Model, optimizer and step: functions and shapes alone. With config.lora the state is that of its leaves.
        tasks = named_tasks(config.evaluate.tasks)
        tuning = Tuning(config, mesh)
        example = abstract(data.example, mesh)
        group.describe_step(config, tuning.shapes, tuning.frozen_shapes, data.train.num_images)
        say(entry("data", data.describe()))

        # -- Run folder, and the state: a checkpoint comes before config.init.
        runner = Runner(group, config, provenance)
        runner.keep_tokenizer(data.tokenizer)
        state, cursor, frozen = tuning.begin(runner, data)
        runner.run.write_settings(config, provenance)

        # -- Train.
        train_step = tuning.compile(tuning.step, tuning.frozen_shapes, example)
        decoder = tuning.decoder
        eval_step = make_eval_step(decoder, mesh, tuning.weight_shapes, example, answers=True)
        batches = group.cleanup.enter_context(contextlib.closing(data.batches(cursor, runner.rows.numbers)))
        sample = SampleAnswer(tuning, data.tokenizer)

        def evaluation(state: TrainState) -> dict[str, float]:
            params, cfg = tuning.whole(state.eval_params, keep=sample.wanted), config.evaluate
            losses = evaluate(eval_step, params, data.validation, cfg.max_rows, mesh)
            return losses | measure_tasks(tasks, decoder, params, data.tokenizer, mesh, cfg.limit, chat=True)

        work = {"vocab_size": decoder.vocab_size, "passes": tuning.passes, "images": data.train.mean_images}
        state = runner.train(train_step, state, frozen, batches, evaluation, sample.write, **work)
        sample.print(state)
    return run.folder

"""Pretraining, from text to a trained run: read `pretrain` from top to bottom."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from gptjax.config import TrainConfig
from gptjax.data.packing import example_batch
from gptjax.data.pipeline import open_pipeline
from gptjax.evals.during import measure_tasks, named_tasks
from gptjax.evals.loss import evaluate, make_eval_step
from gptjax.generation.engine import generate
from gptjax.parallel.processes import barrier, is_main_process, main_process_first, say, working
from gptjax.parallel.sharding import abstract
from gptjax.runs.init_check import check_init
from gptjax.runs.manifest import committed_steps
from gptjax.runs.run import Provenance, Run
from gptjax.runs.warm_start import warm_start
from gptjax.runtime.status import entry
from gptjax.stages.runner import Runner, join, once_a_step, print_sample, sample_settings
from gptjax.tokenizer import set_template
from gptjax.training.build import build_components
from gptjax.training.step import TrainState, compile_step, init_state, run_in_background


def pretrain(config: TrainConfig, provenance: Provenance) -> Path:
    """Trains, or goes on with, the run in config.run_dir and returns its folder.

    Raises InputError for bad input, and Interrupted after a signal or near the time limit, with everything saved.
    """
    # -- Processes and devices. Everything below runs the same in each process, under the one mesh.
    with join(config, provenance) as group:
        mesh, config = group.mesh, group.config

        # -- Model, optimizer and step. Functions and shapes alone: nothing is allocated while settings may be wrong.
        tasks = named_tasks(config.evaluate.tasks)
        decoder, tx, init, step = build_components(config)
        shapes = abstract(jax.eval_shape(init, 0), mesh)
        example = abstract(example_batch(config.data.batch_size, config.data.length), mesh)
        group.describe_step(config, shapes)

        # -- Run folder. The run to start from is checked before, so that a refused start leaves no folder.
        resumes = bool(committed_steps(Run.at(config.run_dir).checkpoints))
        if config.init and not resumes:
            check_init(config)
        runner = Runner(group, config, provenance)
        run = runner.run

        # -- Compilation, in a thread while text is tokenised. Traced here: tracing imports, and no other thread may
        # while tensorflow_datasets is imported (to prepare text), since that replaces Python's own import.
        with working("tracing the training step"):
            lowered = compile_step(step, mesh, shapes, {}, example).lower(shapes, {}, example)
        compiled = run_in_background(lowered.compile, mesh)

        # -- Data. One process prepares it; the others read what that one wrote.
        with main_process_first("data"):
            run.pull(run.data, run.tokenizer)
            data = open_pipeline(config, run.data, training=True, resumes=resumes, say=say)
            if is_main_process():
                set_template(data.tokenizer, config.tokenizer.template)
                data.tokenizer.save(run.tokenizer)
                run.push(run.data, run.tokenizer)
        say(entry("data", data.describe()))
        barrier("ready")

        # -- State. A checkpoint comes before config.init: the same command goes on with a run that was begun.
        if (restored := runner.restore(shapes)) is not None:
            state, cursor = restored
            data.check(cursor)
        else:
            with working("making the first weights"):
                state, cursor = jax.block_until_ready(init_state(init, config.seed, mesh)), data.start
            if config.init:
                state = warm_start(config, data.tokenizer, state, tx, mesh)
                say(f"weights from {config.init}")
        run.write_settings(config, provenance)  # once they are known to be those of the data

        # -- Train. Damaged data is reported now, not after the wait for a long compilation; Gloo waits 30 s where
        # processes first meet, and compiling may differ by more, so they meet once it is done.
        data.batch(0, runner.rows.numbers)
        with working("compiling the training step"):
            train_step = compiled.result()
        barrier("compiled")
        eval_step = make_eval_step(decoder, mesh, state.params, example)
        batches = group.cleanup.enter_context(contextlib.closing(data.batches(cursor, runner.rows.numbers)))
        sampling = sample_settings(config, len(data.tokenizer.encode(config.generate.prompt[0])) + 1)

        def write(params: Any) -> str:
            return generate(decoder, params, data.tokenizer, sampling)[0] if sampling else ""

        def evaluation(state: TrainState) -> dict[str, float]:
            params, cfg = state.eval_params, config.evaluate
            losses = evaluate(eval_step, params, data.validation, cfg.max_rows, mesh)
            return losses | measure_tasks(tasks, decoder, params, data.tokenizer, mesh, cfg.limit)

        sample = once_a_step(write)
        state = runner.train(train_step, state, {}, batches, evaluation, sample, vocab_size=decoder.vocab_size)
        with working("writing a sample"):
            text = sample(state)
        print_sample(sampling, text)
    return run.folder

"""Supervised fine-tuning, from a run and conversations to a run that answers: read `sft` from top to bottom."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax

from gptjax.config import SftConfig
from gptjax.data.chats import ChatData
from gptjax.data.packing import example_batch
from gptjax.evals.during import measure_tasks, named_tasks
from gptjax.evals.loss import evaluate, make_eval_step
from gptjax.generation.chat import stream_answers
from gptjax.model.decoder import init_params
from gptjax.model.lora import merge_lora
from gptjax.parallel.processes import barrier, is_main_process, main_process_first, say, working
from gptjax.parallel.sharding import abstract, shardings
from gptjax.runs.digest import tree_sha256
from gptjax.runs.init_check import check_init
from gptjax.runs.load import check_base
from gptjax.runs.manifest import committed_steps
from gptjax.runs.run import Provenance, Run
from gptjax.runs.warm_start import load_base, warm_start
from gptjax.runtime.status import entry
from gptjax.stages.runner import Runner, join, once_a_step, print_sample, sample_settings
from gptjax.tokenizer.known_templates import template_of
from gptjax.training.build import build_components
from gptjax.training.step import TrainState, compile_step, init_state


def sft(config: SftConfig, provenance: Provenance) -> Path:
    """Fine-tunes the run in config.init into config.run_dir, or goes on with it there, and returns its folder.

    The settings' model and tokenizer are those of config.init: see `init_check.with_init`. Raises InputError for bad
    input, and Interrupted after a signal or near the time limit, with everything saved.
    """
    with join(config, provenance) as group:
        mesh, config = group.mesh, group.config
        run = Run.at(config.run_dir)
        resumes = bool(committed_steps(run.checkpoints))
        if not resumes:
            check_init(config)

        # -- Data, in memory: from it follow the steps, and from these the schedule.
        with main_process_first("data"), working("reading conversations"):
            source = run if resumes else Run.existing(config.init)
            source.pull(source.tokenizer)
            data = ChatData(config, run.data, training=True)
        config = dataclasses.replace(config, steps=data.steps)

        # -- Model, optimizer and step: functions and shapes alone. With config.lora the state is that of its leaves.
        adapts = config.lora.rank > 0
        tasks = named_tasks(config.evaluate.tasks)
        decoder, tx, init, step = build_components(config, config.lora if adapts else None)
        shapes = abstract(jax.eval_shape(init, 0), mesh)
        weight_shapes = abstract(jax.eval_shape(init_params(decoder), jax.random.key(0)), mesh)
        example = abstract(example_batch(config.data.batch_size, config.data.length), mesh)
        group.describe_step(config, shapes)
        say(entry("data", data.describe()))

        # -- Run folder, and the state: a checkpoint comes before config.init.
        runner = Runner(group, config, provenance)
        if is_main_process():
            data.tokenizer.save(runner.run.tokenizer)
            runner.run.push(runner.run.tokenizer)
        barrier("ready")
        if (restored := runner.restore(shapes)) is not None:
            state, cursor = restored
            data.check(cursor)
        else:
            with working("making the first weights"):
                state, cursor = jax.block_until_ready(init_state(init, config.seed, mesh)), data.start
            if not adapts:
                state = warm_start(config, data.tokenizer, state, tx, mesh)
            say(f"weights from {config.init}")
        frozen: dict[str, Any] = {}
        if adapts:
            with working("reading the base"):
                base = load_base(config, data.tokenizer, weight_shapes, cursor["base"]["step"] if restored else 0)
            if restored:
                check_base(config, base.params, cursor["base"])
            else:
                cursor = {**cursor, "base": {"step": base.step, "sha256": tree_sha256(base.params)}}
            frozen = {"base": base.params}
        runner.run.write_settings(config, provenance)

        # -- Train.
        with working("compiling the training step"):
            train_step = compile_step(step, mesh, shapes, frozen, example).lower(shapes, frozen, example).compile()
        barrier("compiled")
        eval_step = make_eval_step(decoder, mesh, weight_shapes, example)
        merge = jax.jit(merge_lora, out_shardings=shardings(weight_shapes, mesh))
        batches = group.cleanup.enter_context(contextlib.closing(data.batches(cursor, runner.rows.numbers)))
        asked = [{"role": "user", "content": config.generate.prompt[0]}]
        before, _ = template_of(data.tokenizer).render(data.tokenizer, asked, add_generation_prompt=True)
        sampling = sample_settings(config, len(before)) if config.generate.prompt[0] else None

        def whole(params: Any) -> Any:
            return merge(frozen["base"], params, config.lora.scale) if adapts else params

        def evaluation(state: TrainState) -> dict[str, float]:
            params, cfg = whole(state.eval_params), config.evaluate
            losses = evaluate(eval_step, params, data.validation, cfg.max_rows, mesh)
            return losses | measure_tasks(tasks, decoder, params, data.tokenizer, mesh, cfg.limit)

        def write(params: Any) -> str:
            if sampling is None:
                return ""
            pieces = stream_answers(decoder, whole(params), data.tokenizer, [asked], sampling)
            return "".join(piece for _, piece in pieces)

        sample = once_a_step(write)
        state = runner.train(train_step, state, frozen, batches, evaluation, sample, vocab_size=decoder.vocab_size)
        with working("writing a sample"):
            text = sample(state)
        print_sample(sampling, text, between="\n")
    return run.folder

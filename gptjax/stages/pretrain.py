"""Pretraining, from text to a trained run: the corpus, the model, the loop, evaluation and a sample."""

import contextlib
import dataclasses
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from gptjax.config import TrainConfig
from gptjax.config.section import leaves
from gptjax.data.packing import example_batch
from gptjax.data.pipeline import open_pipeline
from gptjax.evals.loss import evaluate, make_eval_step
from gptjax.generation.engine import generate
from gptjax.model.decoder import Decoder
from gptjax.ops.attention import describe
from gptjax.parallel.processes import (
    all_reduce_max_lagged,
    barrier,
    broadcast_from_main,
    is_main_process,
    join_processes,
    main_process_first,
)
from gptjax.parallel.sharding import abstract, local_rows, make_mesh
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.digest import committed_steps
from gptjax.runs.run import Run
from gptjax.runs.warm_start import check_init, warm_start
from gptjax.runtime.process import STARTED
from gptjax.tokenizer import Tokenizer
from gptjax.training.build import build_components, check_divisible
from gptjax.training.loop import (
    Diverged,
    Interrupted,
    TimeLimit,
    TrainState,
    compile_step,
    enable_compile_cache,
    fit,
    init_state,
    run_in_background,
    stop_on_signals,
)
from gptjax.training.metrics import Metrics

ASKED, NEAR = 1, 2  # why training ends early: a signal, or the time limit
SAVE_BYTES_A_SECOND = 5e7  # of a process, to a slow disk; how long the last save may take is guessed by it at first


def pretrain(config: TrainConfig, recipe: dict[str, str], origins: dict[str, str]) -> Path:
    """Trains, or goes on with, the run in config.run_dir and returns its folder.

    `recipe` and `origins` say where the settings came from, for config.json. Raises InputError for bad input and
    train.Interrupted after a signal, with everything saved.
    """
    # What `ending` holds is ended however this ends, each step whether or not another fails.
    with stop_on_signals() as signals, contextlib.ExitStack() as ending:
        join_processes(dict(leaves(config)) | {"recipe": recipe["sha256"]}, config.run_dir)
        if config.compile_cache:
            enable_compile_cache()
        mesh = make_mesh(config.mesh)
        check_divisible(config, mesh.shape)
        rows = local_rows(config.data.batch_size, mesh)
        with jax.set_mesh(mesh):
            attention = describe(config.model, config.data.length, config.data.several_documents)
        decoder, tx, init, step = build_components(config)
        if config.init and not committed_steps(Run.at(config.run_dir).checkpoints):
            check_init(config)
        run = Run.open(config.run_dir, config, recipe, origins)
        ending.callback(run.close)
        for line in run.changes:
            _say(line)
        shapes = abstract(jax.eval_shape(init, 0), mesh)
        example = abstract(example_batch(config.data.batch_size, config.data.length), mesh)
        step = compile_step(step, mesh, shapes, {}, example)
        with jax.set_mesh(mesh):
            # Traced here: tracing imports, and while tensorflow_datasets is imported (to prepare text, next) no other
            # thread may, since it exchanges Python's own import for one that breaks JAX's.
            lowered = step.lower(shapes, {}, example)
        compiled = run_in_background(lowered.compile, mesh)
        with main_process_first("feed"):
            run.pull(run.data)
            feed = open_pipeline(config, run.data, training=True, say=_say)
            if is_main_process():
                feed.tokenizer.save(run.tokenizer)
                run.push(run.data, run.tokenizer)
        _say(feed.describe())

        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        barrier("ready")
        with jax.set_mesh(mesh):
            start, data_state = 0, feed.start
            if broadcast_from_main("newest", checkpoints.newest()) is not None:
                start, state, data_state, _ = checkpoints.restore(shapes)
                feed.check(data_state)
                _say(f"resumed {run.folder} after step {start}")
            else:
                state = init_state(init, config.seed, mesh)
                if config.init:
                    state = warm_start(config, feed.tokenizer, state, tx, mesh)
                    _say(f"weights from {config.init}")
            feed.batch(0, rows.numbers)  # damaged data is told now, not after the wait for a long compilation
            _say(attention)
            train_step = compiled.result()
            barrier("compiled")  # Gloo waits 30 s where processes first meet, and compiling may differ by more
            eval_step = make_eval_step(decoder, mesh, state.params, example)
            metrics = Metrics(run.metrics_path, run.tensorboard, config, decoder.vocab_size, resumed_step=start)
            ending.callback(metrics.close)
            ending.callback(checkpoints.wait, together=False)
            by_source: dict[int, dict[str, int]] = {}

            def evaluate_at(i: int, state: Any) -> None:
                found = evaluate(eval_step, trained_params(state), feed.validation, config.evaluate.max_rows, mesh)
                metrics.log_evaluation(i, found)
                retain()  # decided after the evaluation, which may make this step one of the best

            def retain() -> None:
                checkpoints.wait()  # the save that it may refer to is on the disk
                if is_main_process():  # which has the metrics, and deletes
                    checkpoints.retain(metrics.file.best_steps(config.checkpoint.keep_best, among=checkpoints.steps()))

            def log(i: int, values: dict) -> None:
                checkpoints.check()  # a save that failed in the background is told at the next step
                metrics.log_step(i, values | by_source.pop(i, {}))

            def save(i: int, state: Any, data_state: dict) -> None:
                retain()
                checkpoints.save(i, state, data_state, dict(leaves(config)), first=run.push_logs)

            def batches() -> Generator[tuple[dict, dict]]:
                # Closing it ends its threads and workers.
                with contextlib.closing(feed.batches(data_state, rows.numbers)) as made:
                    for i, (batch, after) in enumerate(made, start + 1):
                        by_source[i] = {f"tokens_{name}": count for name, count in after["tokens"].items() if name}
                        yield batch, after

            due = start > 0 and (start % config.evaluate.every == 0 or start == config.steps)
            if due and not broadcast_from_main("evaluated", is_main_process() and metrics.file.has_evaluation(start)):
                evaluate_at(start, state)  # the run ended between a save and its evaluation
            profile = (*config.profile_steps, run.profile) if config.profile_steps else None
            size = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
            limit = TimeLimit(
                config.time_limit_seconds, STARTED, lambda: checkpoints.seconds or size / SAVE_BYTES_A_SECOND
            )

            reason = all_reduce_max_lagged(lambda: NEAR if limit.near() else ASKED if signals.stop() else 0)

            def stop() -> bool:
                why = reason()
                if why == NEAR:  # for any of the processes, which did not start at the same moment
                    _say(f"time_limit={config.time_limit} is near: saving, and ending")
                return why > 0

            signals.defer()
            given = ending.enter_context(contextlib.closing(batches()))
            with together(checkpoints, ending):
                state = fit(
                    train_step, state, {}, given, config.steps,
                    mesh=mesh, rows=rows, log=log, save=save, save_every=config.checkpoint.every,
                    save_at=config.checkpoint.at,
                    hooks={evaluate_at: config.evaluate.every}, stop=stop, trace=profile,
                )  # fmt: skip
            if config.sample:
                _print_sample(config, decoder, trained_params(state), feed.tokenizer)
    return run.folder


@contextlib.contextmanager
def together(checkpoints: Checkpoints, ending: contextlib.ExitStack) -> Generator[None]:
    """Has no process leave before all have saved and closed, where all come to the block's end, at the same step.

    Another exception may be of one process alone, and the others would never come.
    """
    agreed_on = None
    try:
        yield
    except (Interrupted, Diverged) as e:
        agreed_on = e
    checkpoints.wait()
    ending.close()
    barrier("closed")
    if agreed_on is not None:
        raise agreed_on


def trained_params(state: TrainState) -> Any:
    """The weights that a run evaluates and generates with: the averaged ones where it keeps them."""
    return state.ema or state.params


def _print_sample(config: TrainConfig, decoder: Decoder, params: Any, tokenizer: Tokenizer) -> None:
    """Prints a continuation of the recipe's prompt, as long as its settings and the context allow."""
    prompt = config.generate.prompt[0]
    room = config.data.length - len(tokenizer.encode(prompt)) - 1
    if room < 1:
        _say(f"no sample: generate.prompt fills the context of {config.data.length} tokens")
        return
    settings = dataclasses.replace(
        config.generate, prompt=(prompt,), max_new_tokens=min(room, config.generate.max_new_tokens)
    )
    text = generate(decoder, params, tokenizer, settings)[0]
    if is_main_process():
        print(f"\nsample of {settings.max_new_tokens} tokens:\n{prompt}{text}\n", flush=True)


def _say(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr, flush=True)

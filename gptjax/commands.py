"""Verbs on a run: evaluate it, continue prompts, show its data, make one of foreign weights.

Each imports its own room: continuing a prompt needs none of data, interop or evals.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax.config import ContinueConfig, DataConfig, EvalConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import InputError, leaves
from gptjax.parallel.processes import join_processes
from gptjax.parallel.sharding import abstract
from gptjax.runs.load import LoadedModel, load_model, open_checkpoints
from gptjax.runs.run import Provenance, Run, load_config
from gptjax.storage import filesystem, resolve_path
from gptjax.tokenizer import open_tokenizer


def evaluate_run(run_dir: str | Path, cfg: EvalConfig) -> dict[str, Any]:
    """Evaluates a run on its validation split: step, eval_loss, eval_perplexity, eval_bits_per_byte, eval_tokens."""
    join_processes({"run": str(run_dir), **dict(leaves(cfg))})
    model = load_model(run_dir, cfg.mesh, cfg.step)
    return evaluate_trained(model, cfg.max_rows)


def evaluate_trained(model: LoadedModel, max_rows: int = 0) -> dict[str, Any]:
    """Evaluates a loaded model on its validation sets: the numbers of `evaluate_run`."""
    from gptjax.data.packing import example_batch
    from gptjax.data.pipeline import open_pipeline
    from gptjax.evals.loss import evaluate, make_eval_step

    # How much of a set in memory is tokenised depends on it.
    limits = dataclasses.replace(model.config.evaluate, max_rows=max_rows)
    model.run.pull(model.run.data)
    data = open_pipeline(dataclasses.replace(model.config, evaluate=limits), model.run.data)
    data.check(model.data_state)
    with jax.set_mesh(model.mesh):
        example = abstract(example_batch(model.config.data.batch_size, model.config.data.length), model.mesh)
        eval_step = make_eval_step(model.decoder, model.mesh, model.params, example)
        metrics = evaluate(eval_step, model.params, data.validation, max_rows, model.mesh)
    return {"step": model.step, **metrics}


def generate_run(run_dir: str | Path, cfg: ContinueConfig, write: Callable[[str], None]) -> None:
    """Continues cfg.prompt with a run, writing text as it comes; several prompts are written one after the other."""
    from gptjax.generation.engine import stream

    join_processes({"run": str(run_dir), **dict(leaves(cfg))})
    model = load_model(run_dir, None, cfg.step)
    with jax.set_mesh(model.mesh):
        pieces = stream(model.decoder, model.params, model.tokenizer, cfg)
        first = list(itertools.islice(pieces, 1))  # a prompt that does not fit is refused before anything is written
        if len(cfg.prompt) == 1:
            write(cfg.prompt[0])
            for _, piece in itertools.chain(first, pieces):
                write(piece)
            write("\n")
            return
        texts = list(cfg.prompt)
        for row, piece in itertools.chain(first, pieces):
            texts[row] += piece
        for text in texts:
            write(f"{text}\n")


def show_step(run_dir: str | Path, step: int, rows: int) -> str:
    """The rows of a training step of a run, as text; step 1 is the first.

    Raises InputError where the data is not what the run's newest checkpoint was trained on.
    """
    from gptjax.data.pipeline import open_pipeline
    from gptjax.data.show import show
    from gptjax.runs.events import rows_of_step

    config, run = load_config(run_dir), Run.existing(run_dir)
    run.pull(run.data, run.events_path)
    first, batch_size = rows_of_step(run.events_path, step, config.data.batch_size)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))
    data = open_pipeline(config, run.data)
    checkpoints = open_checkpoints(run_dir)
    if (newest := checkpoints.newest()) is not None:
        data.check(checkpoints.data_state(newest))
    return show(data.batch(first), data.tokenizer, range(min(rows, batch_size)), data.sources(first))


def import_run(source: str | Path, run_dir: str | Path) -> str:
    """Makes a run of a Hugging Face folder (GPT-2, Llama, Mistral, Qwen3) or a GGUF file; returns a line about it.

    Raises InputError where the source is neither, holds what the decoder can't represent, or run_dir is a run already.
    """
    from gptjax.interop.gguf import import_gguf, is_gguf
    from gptjax.interop.huggingface import import_huggingface, set_conventions
    from gptjax.runs.checkpoint import Checkpoints

    if filesystem(resolve_path(run_dir)).is_file(Run.at(run_dir).config_path):
        raise InputError(f"{run_dir} is a run already; give another folder")
    tokenizer, reason = None, ""
    if is_gguf(Path(source)):
        (model, vocab_size, context, params), tokenizer, reason = import_gguf(Path(source))
    else:
        model, vocab_size, context, params = import_huggingface(Path(source))
        try:
            tokenizer = open_tokenizer(Path(source))
            set_conventions(tokenizer, Path(source))
        except InputError as error:
            reason = str(error)
    note = f"; it takes no text: {reason}" if reason else ""
    config = TrainConfig(
        run_dir=str(run_dir),
        model=model,
        tokenizer=TokenizerConfig(
            kind=tokenizer.kind if tokenizer else "sentencepiece",  # pyright: ignore[reportArgumentType]
            vocab_size=vocab_size,
            path=str(Path(source).absolute()) if tokenizer else "",
        ),
        data=DataConfig(source=str(source), length=context),
    )
    run = Run.open(run_dir, config, Provenance(str(source)))
    if tokenizer is not None:
        tokenizer.save(run.tokenizer)
        run.push(run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    checkpoints.save(0, {"params": params}, {"rows": 0}, dict(leaves(config)))
    checkpoints.wait()
    run.close()
    count = sum(x.size for x in jax.tree.leaves(params))
    return f"imported {count:,} parameters (vocabulary padded) into {run.folder}{note}"

"""A run made of weights from elsewhere: `gptjax import`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from gptjax.config import DataConfig, ImportConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import InputError, leaves, one_line
from gptjax.interop.gguf import import_gguf, is_gguf
from gptjax.interop.hub import fetch
from gptjax.interop.huggingface import import_huggingface
from gptjax.interop.image_processor import with_marks
from gptjax.parallel.processes import barrier, is_main_process, join_processes, main_process_first
from gptjax.parallel.sharding import make_mesh
from gptjax.runs.checkpoint import CheckpointError, Checkpoints
from gptjax.runs.run import Provenance, Run
from gptjax.storage import filesystem, resolve_path
from gptjax.tokenizer import open_tokenizer, set_template
from gptjax.tokenizer.conventions import set_conventions

AS_IS = ImportConfig()


def import_run(source: str | Path, run_dir: str | Path, cfg: ImportConfig = AS_IS) -> tuple[str, tuple[str, ...]]:
    """Makes a run of a model, its weights straight on the mesh of `cfg`; returns a line about it, and the next command.

    The source is a folder as Hugging Face stores it, a GGUF file, or a name of the hub (see hub.py). Raises InputError
    where it is none, holds what the decoder can't represent, run_dir is a run already, or it can't be saved; nothing is
    left in run_dir then.
    """
    join_processes({"source": str(source), "run": str(run_dir), **dict(leaves(cfg))}, run_dir)
    if filesystem(resolve_path(run_dir)).is_file(Run.at(run_dir).config_path):
        raise InputError(f"{run_dir} is a run already; give another folder")
    mesh = make_mesh(cfg.mesh)
    with main_process_first("fetched"):
        path, name = fetch(str(source))
    tokenizer, reason = None, ""
    if is_gguf(path):
        (model, vocab_size, context, params), tokenizer, reason = import_gguf(path, mesh)
    else:
        model, vocab_size, context, params = import_huggingface(path, mesh)
        try:
            tokenizer = open_tokenizer(path)
            set_conventions(tokenizer, path)
        except InputError as error:
            reason = str(error)
    model = with_marks(model, tokenizer)
    if tokenizer is not None:
        set_template(tokenizer, cfg.template)
        reason = f"chat template: {tokenizer.template or 'none that is known'}"
    else:
        reason = f"it takes no text: {reason}"
    config = TrainConfig(
        run_dir=str(run_dir),
        model=model,
        tokenizer=TokenizerConfig(
            kind=tokenizer.kind if tokenizer else "sentencepiece",  # pyright: ignore[reportArgumentType]
            vocab_size=vocab_size,
            path=str(path.absolute()) if tokenizer else "",
            template=cfg.template,
        ),
        data=DataConfig(source=str(source), length=context),
    )
    with _nothing_left(run_dir):
        run = Run.open(run_dir, config, Provenance(name))
        if tokenizer is not None and is_main_process():
            tokenizer.save(run.tokenizer)
            run.push(run.tokenizer)
        barrier("tokenizer saved")
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        checkpoints.save(0, {"params": params}, {"rows": 0}, dict(leaves(config)))
        checkpoints.wait()
        run.close()
    count = sum(x.size for x in jax.tree.leaves(params))
    said = f"imported {count:,} parameters (vocabulary padded) into {run.folder}; {reason}"
    if tokenizer is None:
        return said, ("checkpoint", "verify", str(run_dir))
    if tokenizer.template:
        return said, ("generate", str(run_dir), "--chat", "--prompt", "What is the capital of France?")
    return said, ("generate", str(run_dir), "--prompt", "The capital of France is")


@contextlib.contextmanager
def _nothing_left(run_dir: str | Path) -> Iterator[None]:
    """Removes what was made in a folder where the block fails, and the folder where it was not there before."""
    store, folder = filesystem(resolve_path(run_dir)), Run.at(run_dir).folder
    existed, before = store.is_folder(folder), set(store.names(folder))
    try:
        yield
    except BaseException as error:
        if is_main_process():
            store.release(folder)
            for name in [name for name in store.names(folder) if name not in before] if existed else [""]:
                store.remove(folder / name)
        if isinstance(error, (OSError, CheckpointError)) and not isinstance(error, InputError):
            raise InputError(f"{run_dir}: {one_line(error)}") from error
        raise

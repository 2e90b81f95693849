"""Checks of an export that need no weights, and no jax: a model that can't be exported is told before it is trained."""

import importlib.util
from pathlib import Path

from gptjax.config import TrainConfig
from gptjax.config.export import ExportConfig
from gptjax.config.section import InputError
from gptjax.interop.families import ModelFamily, family_of
from gptjax.storage import Disk, filesystem, resolve_path


def check_export(config: TrainConfig, cfg: ExportConfig) -> ModelFamily:
    """The family that a model is exported as; raises InputError where none can express it, or a package is missing."""
    if config.model.block:
        raise InputError(
            f"model.block={config.model.block!r} is code that no other program has, so the model can't be exported"
        )
    if importlib.util.find_spec("safetensors") is None:
        raise InputError("an export needs a package more: pip install 'gptjax[hf]'")
    return family_of(config.model, config.tokenizer.vocab_size, config.data.length)


def partial_of(folder: Path) -> Path:
    """The folder in which an export is made, which is renamed once it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def check_new_folder(folder: str | Path) -> Path:
    """The folder to make; raises InputError where it holds something, can't be made, or lies in a bucket."""
    path = resolve_path(folder)
    if not isinstance(filesystem(path), Disk):
        raise InputError(f"{folder}: an export can't be written there; wanted a folder of this machine, to upload")
    path = path.absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"{folder} is there already; wanted a new folder, or an empty one")
    filesystem(path).make_writable(path.parent, "an export", "give another folder")
    return path

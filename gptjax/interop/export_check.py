"""Checks of an export that need no weights, and no jax: a model that can't be exported is told before it is trained."""

import importlib.util
from pathlib import Path
from typing import Any

from gptjax.config import TrainConfig
from gptjax.config.export import ExportConfig
from gptjax.config.section import InputError, leaves
from gptjax.interop.families import ModelFamily, family_of
from gptjax.interop.foreign import ForeignConfig
from gptjax.interop.gguf_names import WRITTEN
from gptjax.storage import Disk, filesystem, resolve_path

# What a GGUF file says of a model in another way than by a key, or not at all, for it changes no logit.
BESIDE_KEYS = ("model_type", "dtype", "vocab_size", "tie_word_embeddings", "initializer_range")


def check_export(config: TrainConfig, cfg: ExportConfig) -> ModelFamily:
    """The family that a model is exported as; raises InputError where none can express it, or a package is missing."""
    if "score_D" in config.heads:
        raise InputError("a reward model can't be exported: no format has a place for its head")
    if config.model.block:
        raise InputError(
            f"model.block={config.model.block!r} is code that no other program has, so the model can't be exported"
        )
    package, extra = ("gguf", "gguf") if cfg.format == "gguf" else ("safetensors", "hf")
    if importlib.util.find_spec(package) is None:
        raise InputError(f"an export as {cfg.format} needs a package more: pip install 'gptjax[{extra}]'")
    sizes = config.tokenizer.vocab_size, config.data.length
    family = family_of(config.model, *sizes)
    if cfg.format == "gguf":
        _check_gguf(family, family.write(config.model, *sizes))
    return family


def _check_gguf(family: ModelFamily, settings: dict[str, Any]) -> None:
    """Raises InputError where llama.cpp's architecture is not known here, or its keys say less than a config.json."""
    if family.model_type not in WRITTEN:
        known = " or ".join(WRITTEN)
        raise InputError(f"a {family.architecture} can't be exported as GGUF here; wanted a model of {known}")
    kept = {*WRITTEN[family.model_type].keys.values(), *BESIDE_KEYS}
    whole, left = (
        dict(leaves(family.read(ForeignConfig(Path("config.json"), values))[0]))
        for values in (settings, {name: value for name, value in settings.items() if name in kept})
    )
    if lost := [f"model.{name}={value!r}" for name, value in whole.items() if left[name] != value]:
        raise InputError(f"a {family.architecture} with {' and '.join(lost)} can't be exported as GGUF here")


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

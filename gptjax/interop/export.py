"""Export of a run's model: the folder that transformers opens, or a GGUF file, each with a model card.

A folder gets its name once it is whole and was read back; what a kill leaves is hidden (`partial_of`).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.config.export import GGUF_FILE, ExportConfig
from gptjax.config.section import InputError, one_line
from gptjax.interop.card import model_card
from gptjax.interop.export_check import check_export, check_new_folder, partial_of
from gptjax.interop.families import ModelFamily
from gptjax.interop.gguf_keys import answer_ends, tokenizer_keys
from gptjax.interop.image_processor import image_tokens_of, said_of_images, with_image_id, written_processor
from gptjax.interop.layout import written_tensors
from gptjax.interop.weights_file import MOST_BYTES, Tensor, check_weights, write_weights
from gptjax.runs.load import LoadedModel, load_model
from gptjax.runs.run import load_config
from gptjax.storage import sync
from gptjax.tokenizer import META_FILE, Tokenizer
from gptjax.tokenizer.export import write_tokenizer


def export_run(run_dir: str | Path, folder: str | Path, cfg: ExportConfig) -> str:
    """Exports a run's model at a checkpoint into a new folder; returns a line about it.

    Raises InputError, before any weight is read, where the folder holds something, a package is missing, or the model
    can't be expressed in the format; and where the run has no sound checkpoint.
    """
    check_export(load_config(run_dir), cfg)
    check_new_folder(folder)
    return export_model(load_model(run_dir, None, cfg.step), folder, cfg)


def export_model(model: LoadedModel, folder: str | Path, cfg: ExportConfig, most_bytes: int = MOST_BYTES) -> str:
    """Exports a model that is open, in files of at most `most_bytes`; see `export_run`."""
    config, path = model.config, check_new_folder(folder)
    tokenizer, vocab_size = _tokenizer(model), config.tokenizer.vocab_size
    family, shape = check_export(config, cfg), with_image_id(config.model, tokenizer)
    settings = family.write(shape, vocab_size, config.data.length)
    tensors = [Tensor(*written) for written in written_tensors(family, model.decoder.clone(cfg=shape), model.params)]
    with _whole(path) as partial:
        if cfg.format == "gguf":
            files = _write_gguf(partial, family, settings, tensors, tokenizer, cfg, model.run.folder.name)
        else:
            files = write_weights(partial, tensors, cfg.weights_dtype, most_bytes)
            check_weights(files, tensors, cfg.weights_dtype)
            ends = _ends(tokenizer) if tokenizer else {}
            _write_json(partial / "config.json", settings | ends | {"dtype": cfg.weights_dtype})
            for name, values in (written_processor(shape, tokenizer) if shape.vision.patch else {}).items():
                _write_json(partial / name, values)
            if tokenizer is not None:
                images = image_tokens_of(shape, vocab_size, tokenizer)
                # Its row is zeros, and so are its logits: it would be drawn wherever all others are below 0.
                never = {"suppress_tokens": [*images.values()]} if images else {}
                _write_json(partial / "generation_config.json", ends | never)
                write_tokenizer(tokenizer, partial, images)
        card = model_card(model.run, dataclasses.replace(config, model=shape), model.step, family.architecture, cfg)
        (partial / "README.md").write_text(card, encoding="utf-8")
    count, several = sum(tensor.size for tensor in tensors), "s" * (len(files) > 1)
    return (
        f"wrote step {model.step:,} of {model.run.folder} into {path}: {family.architecture}, {count:,} parameters as "
        f"{cfg.weights_dtype} in {len(files)} file{several}" + ("" if tokenizer else ", without a tokenizer")
    ) + said_of_images(shape, tokenizer)


def _write_gguf(
    folder: Path, family: ModelFamily, settings: dict[str, Any], tensors: Sequence[Tensor],
    tokenizer: Tokenizer | None, cfg: ExportConfig, name: str,
) -> list[Path]:  # fmt: skip
    from gptjax.interop.gguf_writer import write_gguf

    if tokenizer is None:
        raise InputError("the run has no tokenizer, and a GGUF file is none without; wanted --format huggingface")
    with tempfile.TemporaryDirectory() as files:
        write_tokenizer(tokenizer, Path(files))
        keys = tokenizer_keys(tokenizer, Path(files), settings["vocab_size"])
    write_gguf(folder / GGUF_FILE, family, settings, tensors, keys, cfg.weights_dtype, name)
    return [folder / GGUF_FILE]


def _tokenizer(model: LoadedModel) -> Tokenizer | None:
    """The run's tokenizer; None where it was imported without one."""
    model.run.pull(model.run.tokenizer)
    return model.tokenizer if (model.run.tokenizer / META_FILE).is_file() else None


def _ends(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids that begin and end a text, or an answer where there is a chat template, under transformers' names."""
    ends = answer_ends(tokenizer)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` at the end, once it is on the disk; after an error nothing is left."""
    partial = partial_of(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        os.rename(partial, folder)
        sync(folder.parent)
    except OSError as e:
        raise InputError(f"{folder}: can't be written ({e.strerror or one_line(e)}); make room, or give another") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""Import of weights in Hugging Face's safetensors layout.

Settings that change the logits and have no counterpart in ModelConfig are refused by name, as are tensors that are
missing, left over, or of another shape. Only numbers are read: no pickle, no code that comes with a model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import MeshConfig, ModelConfig
from gptjax.config.section import InputError
from gptjax.interop.families import read_model
from gptjax.interop.folder import CONFIG, WEIGHTS, SafetensorsFolder
from gptjax.interop.foreign import ForeignConfig, read_json
from gptjax.interop.placing import CheckedSource, place
from gptjax.model.decoder import Decoder
from gptjax.parallel.sharding import make_mesh
from gptjax.tokenizer import Tokenizer

Imported = tuple[ModelConfig, int, int, dict[str, Any]]


def import_huggingface(source: Path, mesh: Mesh | None = None) -> Imported:
    """The model's shape, vocabulary size, context and parameters: float32 on the mesh, or without one on one device.

    `source` is a folder with config.json and model.safetensors, or shards with model.safetensors.index.json. The model
    computes in bfloat16 where config.json names that type, else in float32. Its dropout, which belongs to training and
    not to the weights, is 0. Raises InputError where anything is missing, left over, or can't be expressed.
    """
    source = Path(source)
    if not (source / CONFIG).is_file():
        raise InputError(f"{source} holds no {CONFIG}; wanted a Hugging Face folder with {CONFIG} and {WEIGHTS}")
    settings = ForeignConfig(source / CONFIG, read_json(source / CONFIG))
    return assemble(settings, lambda: SafetensorsFolder(source), mesh)


def assemble(settings: ForeignConfig, tensors: Callable[[], CheckedSource], mesh: Mesh | None) -> Imported:
    """A model of these settings and of the tensors, opened once the settings are known to be supported."""
    try:
        family, cfg, vocab_size, context = read_model(settings)
    except InputError as error:  # of our own settings, which know no file
        raise error if str(settings.path) in str(error) else InputError(f"{settings.path}: {error}") from None
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    return cfg, vocab_size, context, place(tensors(), family, Decoder(cfg, vocab_size, context), mesh)


def set_conventions(tokenizer: Tokenizer, source: Path) -> None:
    """Sets if prompts begin with the tokenizer's first token, and the ids beside its last one that end a text.

    From add_bos_token of tokenizer_config.json and eos_token_id of generation_config.json, where these are.
    """
    named, ends = (
        read_json(source / name) if (source / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    tokenizer.begins = named.get("add_bos_token") is not False
    ids = ends.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    tokenizer.stop_ids = tuple(
        i for i in dict.fromkeys(ids) if type(i) is int and 0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id
    )

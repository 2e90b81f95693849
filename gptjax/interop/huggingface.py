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
from gptjax.interop.families import ModelFamily, read_model
from gptjax.interop.folder import CONFIG, WEIGHTS, SafetensorsFolder
from gptjax.interop.foreign import ForeignConfig, read_json
from gptjax.interop.image_processor import with_processor
from gptjax.interop.placing import CheckedSource, place
from gptjax.model.decoder import Decoder
from gptjax.parallel.sharding import make_mesh

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
    return assemble(settings, lambda family: SafetensorsFolder(source, family.name), mesh)


def assemble(settings: ForeignConfig, tensors: Callable[[ModelFamily], CheckedSource], mesh: Mesh | None) -> Imported:
    """A model of these settings and of the tensors, opened once the settings are known to be supported."""
    try:
        family, cfg, vocab_size, context = read_model(settings)
        cfg = with_processor(cfg, settings)
    except InputError as error:  # of our own settings, which know no file
        raise error if str(settings.path) in str(error) else InputError(f"{settings.path}: {error}") from None
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    return cfg, vocab_size, context, place(tensors(family), family, Decoder(cfg, vocab_size, context), mesh)

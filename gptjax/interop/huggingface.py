"""Import of weights in Hugging Face's safetensors layout.

Settings that change the logits and have no counterpart in ModelConfig are refused by name, as are tensors that are
missing, left over, or of another shape. Only numbers are read: no pickle, no code that comes with a model.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import ModelConfig
from gptjax.config.section import InputError
from gptjax.interop.families import HEAD, ModelFamily, read_model
from gptjax.interop.foreign import ForeignConfig
from gptjax.interop.layout import read_slice
from gptjax.model.decoder import Decoder, dims, layer_params, top_params
from gptjax.parallel.sharding import suffix
from gptjax.tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# Constants that older versions of transformers saved beside the weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def import_huggingface(source: Path) -> tuple[ModelConfig, int, int, dict[str, Any]]:
    """The model's shape, vocabulary size, context and parameters: float32 NumPy, the vocabulary padded with zeros.

    `source` is a folder with config.json and model.safetensors, or shards with model.safetensors.index.json. The model
    computes in bfloat16 where config.json names that type, else in float32. Its dropout, which belongs to training and
    not to the weights, is 0. Raises InputError where anything is missing, left over, or can't be expressed.
    """
    source = Path(source)
    if not (source / CONFIG).is_file():
        get = "" if source.exists() else f"; download one with: hf download {source} --local-dir {source.name}"
        raise InputError(f"{source} holds no {CONFIG}; wanted a Hugging Face folder with {CONFIG} and {WEIGHTS}{get}")
    settings = ForeignConfig(source / CONFIG, _read_json(source / CONFIG))
    with contextlib.ExitStack() as stack:
        return assemble(settings, functools.partial(Tensors, source, stack))


def assemble(settings: ForeignConfig, tensors: Callable[[], Any]) -> tuple[ModelConfig, int, int, dict[str, Any]]:
    """A model of these settings and of the tensors, opened once the settings are known to be supported."""
    family, cfg, vocab_size, context = read_model(settings)
    return cfg, vocab_size, context, _params(tensors(), family, Decoder(cfg, vocab_size, context))


def set_conventions(tokenizer: Tokenizer, source: Path) -> None:
    """Sets if prompts begin with the tokenizer's first token, and the ids beside its last one that end a text.

    From add_bos_token of tokenizer_config.json and eos_token_id of generation_config.json, where these are.
    """
    named, ends = (
        _read_json(source / name) if (source / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    tokenizer.begins = named.get("add_bos_token") is not False
    ids = ends.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    tokenizer.stop_ids = tuple(
        i for i in dict.fromkeys(ids) if type(i) is int and 0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id
    )


def _params(tensors: "Tensors", family: ModelFamily, decoder: Decoder) -> dict[str, Any]:
    """Every parameter that the decoder declares, read from the files; raises InputError for tensors left over."""
    params: dict[str, Any] = {name: read_slice(tensors, family, decoder, name) for name in top_params(decoder.cfg)}
    size = dims(decoder.cfg, decoder.vocab_size, decoder.context)
    params["layers"] = {}
    for name in layer_params(decoder.cfg):
        stacked = params["layers"][name] = np.empty(tuple(size[letter] for letter in suffix(name)), np.float32)
        for n in range(len(stacked)):
            stacked[n] = read_slice(tensors, family, decoder, name, n)
    if decoder.cfg.tied and HEAD in tensors.names:
        embed_VD = params["embed_VD"][: decoder.vocab_size]
        if not np.array_equal(tensors.take(HEAD, embed_VD.shape), embed_VD):
            raise InputError(f"{tensors.folder}: tie_word_embeddings is true, but {HEAD} differs from the embedding")
    left = sorted(n for n in tensors.names if n not in tensors.taken and not n.endswith(CONSTANTS))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        plain = f"wanted a plain {family.model_type} model"
        raise InputError(f"{tensors.folder}: no place for tensor {', '.join(left[:3])}{more}; {plain}")
    return params


class Tensors:
    """The tensors of a folder, read one by one, so that memory never holds a second copy of the model."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise InputError(f"reading {WEIGHTS} needs a package more: pip install 'gptjax[hf]'") from None
        self.folder = folder
        self.taken: set[str] = set()
        self.names: dict[str, Any] = {}
        for name in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(folder / name, framework="numpy"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{folder / name} can't be read ({error}); download it again") from None
            for tensor in file.keys():
                if tensor in self.names:
                    raise InputError(f"{folder / name}: tensor {tensor} is also in another file; wanted it once")
                self.names[tensor] = file

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor as float32; raises InputError where it is missing, no float, or of another shape."""
        if name not in self.names:
            raise InputError(f"{self.folder}: tensor {name} is missing; wanted it with shape {list(shape)}")
        stored = self.names[name].get_slice(name)
        if stored.get_dtype() not in ("F32", "F16", "BF16"):
            raise InputError(f"{self.folder}: tensor {name} has type {stored.get_dtype()}; wanted F32, F16 or BF16")
        if list(stored.get_shape()) != list(shape):
            raise InputError(f"{self.folder}: tensor {name} has shape {stored.get_shape()}; wanted {list(shape)}")
        self.taken.add(name)
        return self.names[name].get_tensor(name).astype(np.float32)


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name or not name for name in names):
            raise InputError(f"{folder / INDEX}: wanted weight_map with the name of a file beside it for each tensor")
        return sorted(set(names))
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        advice = "; pickled weights are never read, save the model as safetensors" if pickled else ""
        raise InputError(f"{folder} holds no {WEIGHTS}{advice or f'; wanted it beside {CONFIG}'}")
    return [WEIGHTS]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: wanted a JSON object, got a {type(values).__name__}")
    return values

"""Import of GGUF files (llama.cpp's format): weights dequantised to float32, settings and tokenizer from its keys.

A file is read as the Hugging Face folder that it was made from: its keys become the values of a config.json and its
tensors get the names that huggingface.py reads, so that one table of names and one set of checks serve both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax.config.section import InputError, one_line
from gptjax.interop.folder import check_shape
from gptjax.interop.foreign import ForeignConfig
from gptjax.interop.gguf_file import MAGIC, GGUFFile
from gptjax.interop.gguf_names import ARCHITECTURES, OUTPUT
from gptjax.interop.gguf_tokenizer import read_tokenizer
from gptjax.interop.huggingface import Imported, assemble
from gptjax.tokenizer import Tokenizer

# Keys that may be there with these values alone; others of an architecture are refused by name.
FIXED = {"vocab_size": None, "rope.dimension_count": None, "attention.value_length": None, "rope.scaling.type": "none"}


def is_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF does."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def import_gguf(path: Path, mesh: Mesh | None = None) -> tuple[Imported, Tokenizer | None, str]:
    """The result of import_huggingface for a file, its tokenizer, and the reason where that is None.

    Raises InputError where the file is damaged, or holds what the decoder can't represent.
    """
    file = _Tensors(path)
    vocab_size = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    settings = ForeignConfig(path, file.settings() | {"vocab_size": vocab_size})
    imported = assemble(settings, lambda _: file, mesh)
    try:
        return imported, read_tokenizer(file.keys, path.name), ""
    except InputError as error:
        return imported, None, str(error)


class _Tensors:
    """The tensors of a GGUF file by the names, and with the order of rows, that they have in transformers."""

    def __init__(self, path: Path):
        self.path, self._file = path, GGUFFile(path)
        self.keys, self.tensors = self._file.keys, self._file.tensors
        name = str(self.keys.get("general.architecture"))
        if name not in ARCHITECTURES:
            raise InputError(f"{path}: architecture {one_line(name, 40)!r}; wanted {' or '.join(ARCHITECTURES)}")
        self.architecture = ARCHITECTURES[name]
        self.names = {self.architecture.foreign(name): tensor for name, tensor in self.tensors.items()}

    def settings(self) -> dict[str, Any]:
        """The values of a config.json; raises InputError for a key of the architecture that has no counterpart."""
        architecture, known = self.architecture.name, self.architecture.keys
        values: dict[str, Any] = {"model_type": self.architecture.family, "dtype": "float32"}
        for key, value in self.keys.items():
            name = key.removeprefix(f"{architecture}.")
            if name == key:
                continue
            if name in known:
                # Numbers are stored in single precision: the shortest text of one is what was meant.
                values[known[name]] = float(str(np.float32(value))) if isinstance(value, float) else value
            elif name not in FIXED or FIXED[name] not in (None, value):
                wanted = f"{FIXED[name]!r}" if name in FIXED else "no such key"
                raise InputError(f"{self.path}: {key}={one_line(value, 40)} is not supported; wanted {wanted}")
        rotated, heads = self.keys.get(f"{architecture}.rope.dimension_count"), self._whole("attention.head_count")
        size = values.get("head_dim", self._whole("embedding_length") // heads)
        if rotated not in (None, size):
            raise InputError(f"{self.path}: rope.dimension_count={rotated} with heads of {size}; wanted whole heads")
        if layers := self.architecture.gemma_27b:
            large = self._whole("block_count") == layers
            values["query_pre_attn_scalar"] = self._whole("embedding_length") // heads if large else size
        return values | {"tie_word_embeddings": OUTPUT not in self.tensors}

    def _whole(self, name: str) -> int:
        value = self.keys.get(key := f"{self.architecture.name}.{name}")
        if type(value) is not int or value < 1:
            shown = one_line(repr(value), 40)
            raise InputError(f"{self.path}: {key}={shown}; wanted a whole number above 0")
        return value

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises InputError unless the tensor is there and of this shape."""
        tensor = self.names.get(name)
        turned = tensor is not None and self.architecture.transposed(tensor.name)
        check_shape(self.path, self.names, name, shape[::-1] if turned else shape)

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor as float32; raises InputError where it is missing, of an unknown type, or of another shape."""
        self.check(name, shape)
        stored = self.names[name].name
        x = self._file.read(stored)
        if key := self.architecture.heads(stored):
            # Where none are given for keys and values they have as many as queries.
            heads = self._whole(key if f"{self.architecture.name}.{key}" in self.keys else "attention.head_count")
            # llama.cpp's rotary positions turn neighbouring rows of a head, transformers' those of its two halves.
            x = x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if self.architecture.offset(stored):
            x = x - 1
        return x.T if self.architecture.transposed(stored) else x

"""Import of GGUF files (llama.cpp's format): weights dequantised to float32, settings and tokenizer from its keys.

A file is read as the Hugging Face folder that it was made from: its keys become the values of a config.json and its
tensors get the names that huggingface.py reads, so that one table of names and one set of checks serve both.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax.config.section import InputError, one_line
from gptjax.interop.families import HEAD
from gptjax.interop.folder import check_shape
from gptjax.interop.foreign import ForeignConfig
from gptjax.interop.gguf_file import MAGIC, GGUFFile
from gptjax.interop.gguf_tokenizer import read_tokenizer
from gptjax.interop.huggingface import Imported, assemble
from gptjax.tokenizer import Tokenizer

# llama.cpp's architecture: the model_type that its checkpoints have in transformers.
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3"}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# The keys of an architecture: the name of their value in a config.json.
KEYS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "context_length": "max_position_embeddings",
}  # fmt: skip
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
    imported = assemble(settings, lambda: file, mesh)
    try:
        return imported, read_tokenizer(file.keys, path.name), ""
    except InputError as error:
        return imported, None, str(error)


class _Tensors:
    """The tensors of a GGUF file by the names, and with the order of rows, that they have in transformers."""

    def __init__(self, path: Path):
        self.path, self._file = path, GGUFFile(path)
        self.keys, self.tensors = self._file.keys, self._file.tensors
        self.architecture = str(self.keys.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{path}: architecture {one_line(self.architecture, 40)!r}; wanted {' or '.join(ARCHITECTURES)}"
            )
        self.names = {self._foreign(name): tensor for name, tensor in self.tensors.items()}

    def settings(self) -> dict[str, Any]:
        """The values of a config.json; raises InputError for a key of the architecture that has no counterpart."""
        values: dict[str, Any] = {"model_type": ARCHITECTURES[self.architecture], "dtype": "float32"}
        for key, value in self.keys.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name == key:
                continue
            if name in KEYS:
                # Numbers are stored in single precision: the shortest text of one is what was meant.
                values[KEYS[name]] = float(str(np.float32(value))) if isinstance(value, float) else value
            elif name not in FIXED or FIXED[name] not in (None, value):
                wanted = f"{FIXED[name]!r}" if name in FIXED else "no such key"
                raise InputError(f"{self.path}: {key}={one_line(value, 40)} is not supported; wanted {wanted}")
        rotated, heads = self.keys.get(f"{self.architecture}.rope.dimension_count"), self._heads()
        size = values.get("head_dim", self._whole("embedding_length") // heads)
        if rotated not in (None, size):
            raise InputError(f"{self.path}: rope.dimension_count={rotated} with heads of {size}; wanted whole heads")
        return values | {"tie_word_embeddings": "output.weight" not in self.tensors}

    def _heads(self, kind: str = "") -> int:
        """The number of heads, with kind="_kv" of those of keys and values, which are as many where none is given."""
        missing = kind and f"{self.architecture}.attention.head_count{kind}" not in self.keys
        return self._whole("attention.head_count" + ("" if missing else kind))

    def _whole(self, name: str) -> int:
        value = self.keys.get(f"{self.architecture}.{name}")
        if type(value) is not int or value < 1:
            shown = one_line(repr(value), 40)
            raise InputError(f"{self.path}: {self.architecture}.{name}={shown}; wanted a whole number above 0")
        return value

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises InputError unless the tensor is there and of this shape."""
        check_shape(self.path, self.names, name, shape)

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor as float32; raises InputError where it is missing, of an unknown type, or of another shape."""
        self.check(name, shape)
        stored = self.names[name].name
        x = self._file.read(stored)
        if self.architecture == "llama" and (part := re.search(r"\.attn_([qk])\.", stored)):
            heads = self._heads("_kv" if part[1] == "k" else "")
            # llama.cpp's rotary positions turn neighbouring rows of a head, transformers' those of its two halves.
            x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        return x

    @staticmethod
    def _foreign(name: str) -> str:
        """The name of a tensor in transformers; its own where it has none."""
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if layer and layer[2] in LAYER:
            return f"model.layers.{int(layer[1])}.{LAYER[layer[2]]}.weight"
        return TOP.get(name, name)

"""Export to GGUF, llama.cpp's format: the tensors of a family in another order, its settings and tokenizer as keys."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.section import InputError
from gptjax.interop.families import ModelFamily
from gptjax.interop.gguf_names import WRITTEN
from gptjax.interop.weights_file import DTYPES, Tensor, converted

# general.file_type, and the type of a tensor, both by llama.cpp's numbers.
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}


def write_gguf(
    path: Path, family: ModelFamily, settings: dict[str, Any], tensors: Sequence[Tensor], tokenizer: dict[str, Any],
    dtype: str, name: str,
) -> None:  # fmt: skip
    """Writes a file with the tensors of a family, whose config.json would be `settings`, one after the other.

    `tokenizer` are the keys by their names behind "tokenizer.". Matrices get the type, all else stays float32, as
    llama.cpp computes with it. The headers are read back at the end.
    """
    import gguf

    architecture = WRITTEN[family.model_type]
    values = {key: settings[foreign] for key, foreign in architecture.keys.items() if foreign in settings}
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_vocab_size(settings["vocab_size"])
    if "attention.key_length" in values:
        writer.add_rope_dimension_count(values["attention.key_length"])
        writer.add_value_length(values["attention.key_length"])
    for key, value in values.items():
        _add(writer, f"{architecture.name}.{key}", value)
    for key, value in tokenizer.items():
        _add(writer, f"tokenizer.{key}", value)
    types: dict[str, tuple[tuple[int, ...], str]] = {}
    for tensor in tensors:
        stored = architecture.stored(tensor.name)
        shape = tensor.shape[::-1] if architecture.transposed(stored) else tensor.shape
        types[stored] = shape, dtype if len(shape) == 2 and stored != "position_embd.weight" else "float32"
        writer.add_tensor_info(stored, *_described(gguf, *types[stored]))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, (stored, (_, kind)) in zip(tensors, types.items(), strict=True):
            x = converted(tensor, kind)
            x = x.T if architecture.transposed(stored) else x
            if heads := architecture.heads(stored):
                x = x.reshape(values[heads], 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
            x = np.ascontiguousarray(x)
            writer.write_tensor_data(x.view(np.uint8) if kind == "bfloat16" else x)
    finally:
        writer.close()
    _check(gguf, path, types)


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    add[type(value)](key, value)


def _described(gguf: Any, shape: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
    """The arguments of add_tensor_info for a tensor: those of bfloat16 are its bytes, which NumPy has no type for."""
    if dtype != "bfloat16":
        kind = np.dtype(DTYPES[dtype][0])
        return shape, kind, kind.itemsize * int(np.prod(shape))
    pairs = (*shape[:-1], 2 * shape[-1])
    return pairs, np.dtype(np.uint8), int(np.prod(pairs)), gguf.GGMLQuantizationType.BF16


def _check(gguf: Any, path: Path, types: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Reads names, shapes and types back; raises InputError where one is not as it was announced."""
    reader = gguf.GGUFReader(path)
    found = {t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name) for t in reader.tensors}
    wanted = {name: (shape, DTYPES[dtype][1]) for name, (shape, dtype) in types.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise InputError(f"{path}: {wrong[0]} was not written as it should be; check the disk and export again")

"""The tensors of a Hugging Face folder: safetensors, in one file or in shards with their index.

The library reads and checks a file's header; the numbers are read from the file when they are asked for, one tensor at
a time, so that neither a copy of the model nor a mapping of its files stays in memory.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gptjax.config.section import InputError, one_line
from gptjax.interop.foreign import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
MOST_HEADER = 8 * 2**20  # about a hundred bytes a tensor; a shard of the largest models has some hundred
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class StoredTensor(NamedTuple):
    """A tensor in a file: its type as the format names it, its shape, and the place of its first byte."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFolder:
    """The tensors of a folder by name; raises InputError where a file is damaged, missing, or not in the folder.

    `named` gives the name of a stored tensor: versions of transformers have several for one.
    """

    def __init__(self, folder: Path, named: Callable[[str], str] = str):
        self.path = folder
        self.names: dict[str, StoredTensor] = {}
        for name in _weight_files(folder):
            for tensor, stored in ((named(tensor), x) for tensor, x in _header(folder / name).items()):
                if tensor in self.names:
                    raise InputError(f"{folder / name}: tensor {tensor} is also in another file; wanted it once")
                self.names[tensor] = stored

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises InputError unless the tensor is there, of a type that is read, and of this shape."""
        check_shape(self.path, self.names, name, shape)
        if (dtype := self.names[name].dtype) not in DTYPES:
            raise InputError(f"{self.path}: tensor {name} has type {dtype}; wanted {', '.join(DTYPES)}")

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor as float32; raises InputError as `check` does."""
        self.check(name, shape)
        stored = self.names[name]
        numbers = read_numbers(stored.path, DTYPES[stored.dtype], stored.offset, math.prod(shape))
        return numbers.astype(np.float32, copy=False).reshape(shape)


def check_shape(path: Path, names: Mapping[str, Any], name: str, shape: Sequence[int]) -> None:
    """Raises InputError unless `names` has a tensor of this shape; `path` is for the message."""
    if name not in names:
        raise InputError(f"{path}: tensor {name} is missing; wanted it with shape {list(shape)}")
    if (stored := names[name].shape) != tuple(shape):
        raise InputError(f"{path}: tensor {name} has shape {list(stored)}; wanted {list(shape)}")


def read_numbers(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """`count` numbers of a file from the byte `offset` on; raises InputError where the file ends before."""
    try:
        numbers = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise InputError(f"{path} can't be read ({one_line(error)})") from None
    if len(numbers) < count:
        raise InputError(f"{path} became shorter while it was read; wait until it is complete")
    return numbers


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(f"reading {path.name} needs a package more: pip install 'gptjax[hf]'") from None
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise InputError(f"{path} can't be read ({one_line(error)})") from None
    if start.startswith(PICKLES):
        raise InputError(f"{path} is a pickle, which is never read; save the model as safetensors")
    length = int.from_bytes(start, "little")
    if not 2 <= length <= MOST_HEADER:
        raise InputError(f"{path}: a header of {length:,} bytes; wanted a safetensors file, download it again")
    try:
        with safe_open(path, framework="numpy"):  # which checks that the tensors lie end to end and fill the file
            pass
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path} can't be read ({one_line(error)}); download it again") from None
    header.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name or not name for name in names):
            raise InputError(f"{folder / INDEX}: wanted weight_map with the name of a file beside it for each tensor")
        names = sorted(set(names))
    elif (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    else:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        advice = "; pickled weights are never read, save the model as safetensors" if pickled else ""
        raise InputError(f"{folder} holds no {WEIGHTS}{advice or f'; wanted it beside {CONFIG}'}")
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is named by {INDEX}, but is no file; download it again")
    return names

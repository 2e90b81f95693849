"""Weights as safetensors files, written tensor by tensor: a header's length, the header as JSON, the numbers.

The library writes what lies in memory as a whole; here no more than one tensor does. It reads every file back.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.section import InputError
from gptjax.interop.folder import DTYPES as STORED
from gptjax.interop.folder import INDEX, WEIGHTS

MOST_BYTES = 5 * 10**9  # of a file; the largest that the hub takes without care
# By the name of a type: NumPy's, and the one of the format.
DTYPES: dict[str, tuple[Any, str]] = {
    name: (STORED[stored], stored) for name, stored in (("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16"))
}


class Tensor(NamedTuple):
    """A tensor to be written: `read` makes its float32 numbers when their turn comes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def converted(tensor: Tensor, dtype: str) -> np.ndarray:
    """The tensor in a type; raises InputError where a number would become infinite in it."""
    x = tensor.read()
    assert x.shape == tensor.shape, f"{tensor.name}: {x.shape}, but {tensor.shape} was announced"
    with np.errstate(over="ignore"):
        y = np.ascontiguousarray(x, DTYPES[dtype][0])
    if dtype == "float16" and not np.array_equal(np.isfinite(x), np.isfinite(y)):
        largest = np.abs(x[np.isfinite(x)]).max()
        raise InputError(f"{tensor.name} has a weight of {largest:.3g}, too large for float16; add --dtype bfloat16")
    return y


def write_weights(folder: Path, tensors: Sequence[Tensor], dtype: str, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Writes model.safetensors, or shards of at most `most_bytes` with their index where that is too little.

    A tensor that is larger has a file of its own. Returns the files with weights.
    """
    item = np.dtype(DTYPES[dtype][0]).itemsize
    sizes = {tensor.name: item * tensor.size for tensor in tensors}
    parts: list[list[Tensor]] = [[]]
    room = most_bytes
    for tensor in tensors:
        if sizes[tensor.name] > room and parts[-1]:
            parts, room = [*parts, []], most_bytes
        parts[-1].append(tensor)
        room -= sizes[tensor.name]
    count = len(parts)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, part in zip(names, parts, strict=True):
        _write(folder / name, part, dtype, sizes)
    if count > 1:
        weight_map = {tensor.name: name for name, part in zip(names, parts) for tensor in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _write(path: Path, tensors: Sequence[Tensor], dtype: str, sizes: dict[str, int]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    offset = 0
    for tensor in tensors:
        end = offset + sizes[tensor.name]
        entry = {"dtype": DTYPES[dtype][1], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[tensor.name], offset = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of their size
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(converted(tensor, dtype).reshape(-1).view(np.uint8).data)


def check_weights(files: Iterable[Path], tensors: Sequence[Tensor], dtype: str) -> None:
    """Reads the headers back with the library; raises InputError where a tensor is not as it was announced."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    entry = file.get_slice(name)
                    found[name] = entry.get_dtype(), tuple(entry.get_shape())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} can't be read back ({error}); check the disk and export again") from None
    wanted = {tensor.name: (DTYPES[dtype][1], tensor.shape) for tensor in tensors}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise InputError(f"{wrong[0]} was not written as it should be; check the disk and export again")

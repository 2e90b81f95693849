"""The keys and tensors of a GGUF file (llama.cpp's format), read with bounds; `gguf` turns the numbers into float32.

A count or a length is believed only where the file has room for it, so that a damaged or hostile file is refused before
anything is made in its size. Numbers are read when they are asked for; nothing of the file stays mapped.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gptjax.config.section import InputError, one_line
from gptjax.interop.folder import read_numbers

MAGIC = b"GGUF"
MOST_HEADER = 24 * 2**20  # a vocabulary of 200,000 tokens and 440,000 merges takes about 11
MOST_TENSORS, MOST_KEYS = 100_000, 10_000
ALIGNMENT = 32  # of tensors, where general.alignment is not given
BLOCK = 16 * 2**20  # bytes of float32 that are dequantised at a time
# Types of values by number; 8 is a string, 9 an array.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """A tensor in a file: its name, its type (gguf.GGMLQuantizationType), its shape with rows last, and its place."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    bytes: int


class GGUFFile:
    """A file's keys and their values, and its tensors by name; raises InputError where the file is damaged."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise InputError(f"reading {path.name} needs a package more: pip install 'gptjax[gguf]'") from None
        self.path, self._gguf = path, gguf
        try:
            with path.open("rb") as file:
                self.keys, self.tensors = self._header(_Bounded(file, path.stat().st_size))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} can't be read as GGUF ({one_line(error)}); download it again") from None

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32; raises InputError where its type is not known to the package gguf."""
        tensor = self.tensors[name]
        rows = read_numbers(self.path, np.dtype(np.uint8), tensor.offset, tensor.bytes)
        rows = rows.reshape(math.prod(tensor.shape[:-1]), -1)
        x = np.empty((len(rows), tensor.shape[-1]), np.float32)
        step = max(1, BLOCK // (4 * tensor.shape[-1]))
        for first in range(0, len(rows), step):  # gguf holds its result twice
            some = slice(first, first + step)
            try:
                x[some] = self._gguf.dequantize(rows[some], tensor.kind)
            except Exception as error:  # NotImplementedError for a type
                raise InputError(f"{self.path}: tensor {name} of type {tensor.kind.name} can't be read "
                                 f"({one_line(error, 80)})") from None  # fmt: skip
        return x.reshape(tensor.shape)

    def _header(self, file: "_Bounded") -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        magic, version, num_tensors, num_keys = file.unpack("<4sIQQ")
        if magic != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            raise ValueError(f"version {version}; wanted a little-endian file of version 2 or 3")
        if num_tensors > MOST_TENSORS or num_keys > MOST_KEYS:
            raise ValueError(f"{num_tensors:,} tensors and {num_keys:,} keys")
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = file.string()
            if name in keys:
                raise ValueError(f"the key {one_line(name, 80)} twice")
            keys[name] = file.value(*file.unpack("<I"))
        found = [self._tensor(file) for _ in range(num_tensors)]
        alignment = keys.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={one_line(repr(alignment), 40)}")
        begin = -(-file.position // alignment) * alignment
        found = sorted((t._replace(offset=begin + t.offset) for t in found), key=lambda t: t.offset)
        end = begin
        for tensor in found:
            if tensor.offset < end or tensor.offset % alignment:
                raise ValueError(f"tensor {one_line(tensor.name, 80)} begins within another, or beside its place")
            end = tensor.offset + tensor.bytes
            if end > file.size:
                raise ValueError(f"tensor {one_line(tensor.name, 80)} ends at byte {end:,} of {file.size:,}")
        tensors = {t.name: t for t in found}
        if len(tensors) < num_tensors:
            raise ValueError("a tensor's name twice")
        return keys, tensors

    def _tensor(self, file: "_Bounded") -> StoredTensor:
        name = file.string()
        (dimensions,) = file.unpack("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {one_line(name, 80)} with {dimensions} dimensions")
        shape = file.unpack(f"<{dimensions}Q")[::-1]  # the format has rows first
        number, offset = file.unpack("<IQ")
        try:
            kind = self._gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"tensor {one_line(name, 80)} of the unknown type {number}") from None
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        if math.prod(shape) == 0 or shape[-1] % block:
            raise ValueError(f"tensor {one_line(name, 80)} of shape {list(shape)}, in blocks of {block}")
        return StoredTensor(name, kind, shape, offset, math.prod(shape) // block * size)


class _Bounded:
    """A file read up to MOST_HEADER bytes; raises ValueError where it has less than is asked for."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.position = file, size, 0

    def read(self, count: int) -> bytes:
        if count > min(self.size, MOST_HEADER) - self.position:
            raise ValueError(f"{count:,} bytes at byte {self.position:,}: more than there are, or than a header has")
        self.position += count
        return self.file.read(count)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))

    def string(self) -> str:
        return self.read(*self.unpack("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A number, text, or list of them, as `kind` says."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.numbers(kind, 1)[0]
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.unpack("<IQ")
        if inner == STRING:
            return list(self.strings(count))
        if inner not in SCALARS:
            raise ValueError(f"an array of type {inner}")
        return self.numbers(inner, count)

    def strings(self, count: int) -> Iterator[str]:
        if count > MOST_HEADER // 8:
            raise ValueError(f"an array of {count:,} strings")
        return (self.string() for _ in range(count))

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.read(count * dtype.itemsize), dtype).tolist()

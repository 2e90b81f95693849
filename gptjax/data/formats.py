"""Readers of each kind of file: whole texts, JSONL (plain, gzip, zstd) and the text column of Parquet and Arrow.

Nothing is held in memory but one document of a JSONL file or a batch of rows of a table: text files are mapped.
"""

import gzip
import hashlib
import io
import itertools
import json
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError, one_line

TEXTS = (".txt", ".md")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = (*TEXTS, *RECORDS)

_PIECE = 1 << 16  # bytes; long enough to be quick, short enough that a tokenizer stays linear
_BLOCK = 1 << 16  # compressed bytes unpacked at a time
_ROWS = 256  # of a table held at a time


class CorruptData(InputError):
    """A file whose bytes are not what its writer wrote: it can't be unpacked, or holds no JSON or no UTF-8."""


@dataclass(frozen=True)
class Document:
    """One text as UTF-8: bytes [start, stop) of a buffer; `origin` is the file, and for records the line or row."""

    origin: str
    data: bytes | mmap.mmap
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(memoryview(self.data)[self.start : self.stop]).digest()

    @property
    def text(self) -> str:
        """The whole text; raises CorruptData naming file and byte where it is not UTF-8."""
        return self._decode(self.start, self.stop)

    def check(self) -> None:
        """Raises CorruptData naming file and byte where the text is not UTF-8."""
        for _ in self.pieces(_BLOCK):
            pass

    def pieces(self, size: int = _PIECE) -> Iterator[str]:
        """Yields the text in pieces of at most `size` bytes, cut after a newline where there is one, or at a space."""
        start = self.start
        while start < self.stop:
            stop = self._cut(start, min(start + size, self.stop))
            yield self._decode(start, stop)
            start = stop

    def split_tail(self, fraction: float) -> "tuple[Document, Document]":
        """The text without its tail, and the last `fraction` of its bytes, cut at the next whole character."""
        middle = self.start + min(self.num_bytes - 1, max(1, round(self.num_bytes * (1 - fraction))))
        cut = middle
        while cut < self.stop and self.data[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
            cut += 1
        if cut == self.stop:  # the tail keeps at least the last character
            cut = self._character(middle)
        return replace(self, stop=cut), replace(self, start=cut)

    def _cut(self, start: int, stop: int) -> int:
        if stop == self.stop:
            return stop
        newline = self.data.rfind(b"\n", start, stop) + 1
        if newline > start:
            return newline
        space = self.data.rfind(b" ", start + 1, stop)
        if space > start:
            return space
        end = self._character(stop)
        return end if end > start else stop

    def _character(self, at: int) -> int:
        """First byte of the character that the byte at this offset is part of."""
        while at > self.start and self.data[at] & 0xC0 == 0x80:
            at -= 1
        return at

    def _decode(self, start: int, stop: int) -> str:
        try:
            return self.data[start:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise CorruptData(
                f"{self.origin}: byte 0x{self.data[at]:02x} at offset {at} is not UTF-8; convert the file to UTF-8"
            ) from None


def kind_of(path: Path) -> str:
    """The suffix of a file of records, or "text" for a file that is one text."""
    name = path.name.lower()
    return next((suffix for suffix in RECORDS if name.endswith(suffix)), "text")


def read_file(path: Path, field: str = "text") -> Iterator[Document]:
    """Yields the documents of one file; `field` names the text in records.

    Raises CorruptData for a file that can't be unpacked or is no UTF-8 or JSON, and InputError for records without the
    text; both name the file and the line, row or byte.
    """
    kind = kind_of(path)
    if kind == "text":
        return _whole(path)
    return _table(path, field) if kind == ".parquet" else _lines(path, kind, field)


def open_file(path: Path) -> io.BufferedReader:
    """The open file; raises InputError where it can't be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def document_of(text: Any, origin: str, field: str) -> Document:
    """A document of a record's value; raises InputError where that is no text."""
    if isinstance(text, str):
        try:
            text = text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f'{origin}: "{field}" has half a surrogate pair, which is no character; {_wanted(field)}'
            ) from None
    if not isinstance(text, bytes):
        raise InputError(f'{origin}: "{field}" is a {type(text).__name__}; {_wanted(field)}')
    return Document(origin, text, 0, len(text))


def no_field(origin: str, field: str, names: list[str]) -> InputError:
    """The error for records that have no such field."""
    return InputError(
        f'{origin}: found no "{field}" among {sorted(names)[:8]}; {_wanted(field)}, or name the text with --text-field '
        "(--data.text-field where a model is trained)"
    )


def rows_of_table(batch: Any, field: str, origin: str, first: int) -> Iterator[Document]:
    """Yields the text column of a pyarrow table or record batch; its rows are counted from `first`."""
    import pyarrow

    column = batch.column(field)
    kinds = pyarrow.types
    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    tests = (kinds.is_string, kinds.is_large_string, kinds.is_binary, kinds.is_large_binary)
    if not any(test(column.type) for test in (*tests, kinds.is_string_view, kinds.is_binary_view)):
        raise InputError(f'{origin}: column "{field}" holds {column.type}; wanted text')
    # As bytes: Arrow believes what a damaged file says about its UTF-8, Document.check does not.
    for row, text in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), first):
        if text is None:
            raise InputError(f'{origin}:{row}: "{field}" is null; {_wanted(field)}')
        yield Document(f"{origin}:{row}", text, 0, len(text))


def _wanted(field: str) -> str:
    return f'wanted {{"{field}": "..."}}'


def _whole(path: Path) -> Iterator[Document]:
    with open_file(path) as file:
        size = file.seek(0, io.SEEK_END)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""  # nothing can't be mapped
        yield Document(str(path), data, 0, size)


def _lines(path: Path, kind: str, field: str) -> Iterator[Document]:
    number = offset = 0
    for number, line in enumerate(read_lines(path, kind), 1):
        yield _parse_line(line, f"{path}:{number}", offset, field)
        offset += len(line)
    if number == 0:
        raise CorruptData(f"{path} is empty; {_wanted(field)} on each line")


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file with the line or row, record) of a JSONL (also .gz, .zst) or Parquet file, all its columns.

    Raises CorruptData for a file that can't be unpacked or is no UTF-8 or JSON, and InputError for one of another kind
    or without records; both name the file and the line or row.
    """
    kind, found = kind_of(path), False
    if kind == "text":
        raise InputError(f"{path} holds no records; wanted {', '.join(RECORDS)}")
    if kind == ".parquet":
        for first, batch in _batches(path):
            for row, record in enumerate(batch.to_pylist(), first):
                found = True
                yield f"{path}:{row}", record
    else:
        offset = 0
        for number, line in enumerate(read_lines(path, kind), 1):
            found = True
            yield f"{path}:{number}", _parse_object(line, f"{path}:{number}", offset, "wanted one record a line")
            offset += len(line)
    if not found:
        raise CorruptData(f"{path} is empty; wanted records")


def read_lines(path: Path, kind: str) -> Iterator[bytes]:
    """Yields the lines of a file, unpacked where its kind (see `kind_of`) is .jsonl.gz or .jsonl.zst.

    Raises CorruptData, which names the line, for one that can't be unpacked.
    """
    with open_file(path) as raw:
        file = {".jsonl.gz": _ungzip, ".jsonl.zst": _unzstd}.get(kind, lambda file: file)(raw)
        for number in itertools.count(1):
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise CorruptData(f"{path}: line {number} cannot be unpacked ({error}); the file is damaged") from None
            if not line:
                return
            yield line


def _parse_line(line: bytes, origin: str, offset: int, field: str) -> Document:
    """The text of one line of JSONL."""
    value = _parse_object(line, origin, offset, _wanted(field))
    if field not in value:
        raise no_field(origin, field, list(value))
    return document_of(value[field], origin, field)


def _parse_object(line: bytes, origin: str, offset: int, wanted: str) -> dict[str, Any]:
    """The object of one line of JSONL."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise CorruptData(f"{origin}: byte 0x{line[error.start]:02x} at offset {at} is not UTF-8; {wanted}") from None
    except (ValueError, RecursionError) as error:
        problem = "a blank line" if not line.strip() else f"no JSON ({error})"
        raise CorruptData(f"{origin}: found {problem}; {wanted}") from None
    if not isinstance(value, dict):
        raise InputError(f"{origin}: found a JSON {type(value).__name__}; {wanted}")
    return value


def _ungzip(raw: io.BufferedReader) -> io.BufferedReader:
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK)  # its own readline is slower


def _unzstd(raw: io.BufferedReader) -> io.BufferedReader:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(raw, "zstd")  # of several frames too; a truncated one raises OSError
    return io.BufferedReader(stream, _BLOCK)


def _table(path: Path, field: str) -> Iterator[Document]:
    """Reads only the text column of a Parquet file."""
    for first, batch in _batches(path, field):
        yield from rows_of_table(batch, field, str(path), first)


def _batches(path: Path, field: str = "") -> Iterator[tuple[int, Any]]:
    """Yields (number of the first row, record batch) of a Parquet file, a few rows at a time; one column or all."""
    import pyarrow
    from pyarrow import parquet

    with open_file(path) as raw:
        first = 1
        try:
            file = parquet.ParquetFile(raw, buffer_size=_BLOCK, pre_buffer=False, page_checksum_verification=True)
            if field and field not in file.schema_arrow.names:
                raise no_field(str(path), field, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS, columns=[field] if field else None, use_threads=False):
                yield first, batch
                first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            reason = one_line(error, 160)
            raise CorruptData(f"{path}: row {first} cannot be read ({reason}); the file is damaged") from None

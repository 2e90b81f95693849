"""Documents from text files, folders, JSONL and the built-in corpora, and which of them are held out.

Nothing is skipped silently and nothing is held in memory but one document of a JSONL file: text files are mapped.
"""

import gzip
import hashlib
import io
import json
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptjax.settings import InputError

BUILTIN = "builtin:"
CORPORA = Path(__file__).parent / "corpora"
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz")
SPLITS = ("train", "validation")
Split = Literal["train", "validation"]

_PIECE = 1 << 16  # bytes; long enough to be quick, short enough that a tokenizer stays linear
_WANTED = 'wanted {"text": "..."}'


@dataclass(frozen=True)
class Document:
    """One text as UTF-8: bytes [start, stop) of a buffer; `origin` is the file, and for JSONL its line."""

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
        """The whole text; raises InputError naming file and byte where it is not UTF-8."""
        return self._decode(self.start, self.stop)

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
        return (
            Document(self.origin, self.data, self.start, cut),
            Document(self.origin, self.data, cut, self.stop),
        )

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
        """Where the character begins that the byte at this offset is part of."""
        while at > self.start and self.data[at] & 0xC0 == 0x80:
            at -= 1
        return at

    def _decode(self, start: int, stop: int) -> str:
        try:
            return self.data[start:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise InputError(
                f"{self.origin}: byte 0x{self.data[at]:02x} at offset {at} is not UTF-8; convert the file to UTF-8"
            ) from None


def source_files(source: str) -> list[Path]:
    """The files of a source in the order they are read.

    Raises InputError where there are none, or where a file is of a kind that is not known.
    """
    if source.startswith(BUILTIN):
        names = sorted(path.stem for path in CORPORA.glob("*.txt"))
        if source.removeprefix(BUILTIN) not in names:
            raise InputError(f"source {source!r}: wanted one of {', '.join(BUILTIN + name for name in names)}")
        return [CORPORA / f"{source.removeprefix(BUILTIN)}.txt"]
    path = Path(source)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file()]
        if not files:
            raise InputError(f"source {source!r} has no text in it; wanted files {', '.join(SUFFIXES)}")
        return sorted(files, key=lambda p: p.relative_to(path).as_posix())
    if not path.exists():
        raise InputError(f"source {source!r} does not exist; wanted a file, a folder or builtin:shakespeare")
    if path.suffix.lower() in (".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet", ".json") and not _is_jsonl(path):
        raise InputError(f"source {source!r}: this kind is not read; wanted {', '.join(SUFFIXES)} or a folder")
    return [path]


def documents(source: str) -> Iterator[Document]:
    """Yields every document of the source in a fixed order: one a text file, one a line of JSONL.

    Raises InputError, naming file and line or byte, for a text that is empty, is not UTF-8 or is not JSON.
    """
    for path in source_files(source):
        yield from _lines(path) if _is_jsonl(path) else _whole(path)


def source_sha256(source: str) -> str:
    """Identity of a source's content: its files' kinds and bytes in order, wherever they lie."""
    total = hashlib.sha256()
    for path in source_files(source):
        kind = "".join(path.suffixes[-2:]) if _is_jsonl(path) else "text"
        total.update(f"{kind.lower()} {file_sha256(path)}\n".encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Holdout:
    """Which text is held out of training: the tail of a single document, or the documents with a low hash.

    A document's hash is a number in [0, 1) made from its text alone, so neither order nor names matter and equal
    texts stay together. It is validation where the hash is at most `threshold`: the asked fraction, moved just as far
    as is needed for each split to have at least one document.
    """

    num_documents: int
    num_bytes: int
    fraction: float
    threshold: float

    def split(self, document: Document) -> Iterator[tuple[Split, Document]]:
        """Yields the document with its split, or its two parts where it is the only document."""
        if self.num_documents > 1:
            yield "validation" if _unit(document.digest) <= self.threshold else "train", document
        else:
            head, tail = document.split_tail(self.fraction)
            yield "train", head
            yield "validation", tail


def holdout(source: str, fraction: float) -> Holdout:
    """Reads the whole source once and says what is held out; raises InputError where it can't be split in two."""
    count, size, lowest, highest, below, kept = 0, 0, 2.0, -1.0, -1.0, 0
    for document in documents(source):
        count += 1
        size += document.num_bytes
        unit = _unit(document.digest)
        lowest = min(lowest, unit)
        kept += unit > fraction
        if unit != highest:
            below, highest = (highest, unit) if unit > highest else (max(below, unit), highest)
    if size == 0:
        raise InputError(f"source {source!r} has no text in it; wanted at least two characters")
    threshold = fraction
    if count > 1:
        if lowest == highest:
            raise InputError(
                f"source {source!r}: all {count} documents have the same text; "
                "wanted two different ones, one to train on and one to hold out"
            )
        threshold = lowest if lowest > fraction else fraction if kept else below
    found = Holdout(num_documents=count, num_bytes=size, fraction=fraction, threshold=threshold)
    if count == 1:
        only = next(documents(source))
        if not all(part.num_bytes for _, part in found.split(only)):
            raise InputError(f"{only.origin}: one character can't be split in two; wanted at least two to hold one out")
    return found


def split_documents(source: str, held: Holdout) -> Iterator[tuple[Split, Document]]:
    """Yields every document of the source with the split that it belongs to."""
    for document in documents(source):
        yield from held.split(document)


def _unit(digest: bytes) -> float:
    """A hash as a number in [0, 1); 53 bits, so that no two of them round to the same one by accident."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _is_jsonl(path: Path) -> bool:
    return path.name.lower().endswith((".jsonl", ".jsonl.gz"))


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def _whole(path: Path) -> Iterator[Document]:
    with _opened(path) as file:
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise InputError(f"{path} is empty; wanted text")
        yield Document(str(path), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0, size)


def _lines(path: Path) -> Iterator[Document]:
    number = offset = 0
    with _opened(path) as raw:
        file = gzip.open(raw) if path.name.lower().endswith(".gz") else raw
        while True:
            number += 1
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path}: line {number} cannot be unpacked ({error}); the file is damaged") from None
            if not line:
                break
            data = _text_of(line, f"{path}:{number}", offset)
            yield Document(f"{path}:{number}", data, 0, len(data))
            offset += len(line)
    if number == 1:
        raise InputError(f"{path} is empty; {_WANTED} on each line")


def _text_of(line: bytes, origin: str, offset: int) -> bytes:
    """The text of one line of JSONL as UTF-8."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise InputError(f"{origin}: byte 0x{line[error.start]:02x} at offset {at} is not UTF-8; {_WANTED}") from None
    except (ValueError, RecursionError) as error:
        found = "a blank line" if not line.strip() else f"no JSON ({error})"
        raise InputError(f"{origin}: found {found}; {_WANTED}") from None
    if not isinstance(value, dict):
        raise InputError(f"{origin}: found a JSON {type(value).__name__}; {_WANTED}")
    if "text" not in value:
        raise InputError(f'{origin}: found no "text" among {sorted(value)[:8]}; {_WANTED}')
    text = value["text"]
    if not isinstance(text, str):
        raise InputError(f'{origin}: "text" is a {type(text).__name__}; {_WANTED}')
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f'{origin}: "text" has half a surrogate pair, which is no character; {_WANTED}') from None

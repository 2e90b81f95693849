"""Documents from any source in a fixed order, the source's identity, and which of its text is held out.

Files are read by formats.py, datasets and functions by records.py; nothing is skipped silently.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gptjax.config.plugins import is_name
from gptjax.config.section import InputError
from gptjax.data.formats import SUFFIXES, CorruptData, Document, file_sha256, kind_of, read_file
from gptjax.data.records import HF, TFDS, Source, SourceFile, open_function, open_hf, open_tfds

BUILTIN = "builtin:"
CORPORA = Path(__file__).parent / "corpora"
SplitName = Literal["train", "validation"]
LOCK_FILE = ".prepare.lock"  # in every folder that `prepare` writes, from its beginning on
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")

_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".json", ".arrow")  # of these only the known kinds are read


def open_source(source: str | Source, text_field: str = "text") -> Source:
    """Finds the source's parts; raises InputError where it is not there or of a kind that is not known.

    A file, a folder of files (.txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, also mixed), builtin:NAME, tfds:...,
    hf:..., or MODULE:FUNCTION.
    """
    if isinstance(source, Source):
        return source
    if source.startswith(TFDS):
        return open_tfds(source, text_field)
    if source.startswith(HF):
        return open_hf(source, text_field)
    if is_function(source):
        return open_function(source, text_field)
    files = source_files(source)
    units = tuple(SourceFile(str(path), lambda path=path: read_file(path, text_field)) for path in files)
    return Source(source, units, tuple((kind_of(path), path) for path in files))


def is_function(source: str) -> bool:
    """Whether a source is the name of a function, whose module is imported to read it."""
    return not source.startswith((BUILTIN, TFDS, HF)) and is_name(source) and not Path(source).exists()


def source_files(source: str) -> list[Path]:
    """The files of a source of files in the order they are read, without those of prepared folders inside it.

    Raises InputError where there are none, or where a file is of a kind that is not known.
    """
    if source.startswith(BUILTIN):
        names = sorted(path.stem for path in CORPORA.glob("*.txt"))
        if source.removeprefix(BUILTIN) not in names:
            raise InputError(f"source {source!r}: wanted one of {', '.join(BUILTIN + name for name in names)}")
        return [CORPORA / f"{source.removeprefix(BUILTIN)}.txt"]
    path = Path(source)
    if path.is_dir():
        made = {p.parent for p in path.rglob(LOCK_FILE)} - {path}  # a tokenizer there may have a merges.txt
        files = [p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file()]
        files = [p for p in files if made.isdisjoint(p.parents)]
        if not files:
            raise InputError(f"source {source!r} has no text in it; wanted files {', '.join(SUFFIXES)}")
        return sorted(files, key=lambda p: p.relative_to(path).as_posix())
    if not path.exists():
        raise InputError(
            f"source {source!r} does not exist; wanted a file, a folder, builtin:shakespeare, tfds:NAME, hf:NAME or "
            "MODULE:FUNCTION"
        )
    if path.suffix.lower() in _PACKED and kind_of(path) == "text":
        raise InputError(f"source {source!r}: this kind is not read; wanted {', '.join(SUFFIXES)} or a folder")
    return [path]


class ErrorBudget:
    """Counts the corrupt parts of a source that are left out; `found` says which, and why."""

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.found: list[str] = []

    def add(self, error: CorruptData) -> None:
        """Raises InputError naming all of them where this is one more than allowed."""
        self.found.append(str(error))
        if not self.allowed:
            raise error
        if len(self.found) > self.allowed:
            raise InputError(f"{len(self.found)} corrupt files, max_corrupt={self.allowed}: {' | '.join(self.found)}")


def documents(source: str | Source, text_field: str = "text") -> Iterator[Document]:
    """Yields every document of the source in a fixed order: one a text file, one a record of the other kinds.

    Raises InputError, naming file and line, row or byte, for a record without the text, and for a corrupt file.
    """
    for unit in open_source(source, text_field).units:
        yield from unit.read()


def source_sha256(source: str | Source, text_field: str = "text") -> str:
    """Identity of a source's content: its files' kinds and bytes in order, wherever they lie, or its documents."""
    source = open_source(source, text_field)
    if not source.files:
        content = ContentHash()
        for document in documents(source):
            content.add(document.digest)
        return content.hexdigest
    total = hashlib.sha256()
    for kind, path in source.files:
        total.update(f"{kind} {file_sha256(path)}\n".encode())
    return total.hexdigest()


class ContentHash:
    """The identity of a source that is no file, from the digests of its documents in order."""

    def __init__(self):
        self._total = hashlib.sha256(b"documents\n")

    def add(self, digest: bytes) -> None:
        self._total.update(digest)

    def copy(self) -> "ContentHash":
        made = ContentHash()
        made._total = self._total.copy()
        return made

    @property
    def hexdigest(self) -> str:
        return self._total.hexdigest()


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

    def split(self, document: Document) -> Iterator[tuple[SplitName, Document]]:
        """Yields the document with its split, or its two parts where it is the only document."""
        if self.num_documents > 1:
            yield "validation" if unit_hash(document.digest) <= self.threshold else "train", document
        else:
            head, tail = document.split_tail(self.fraction)
            yield "train", head
            yield "validation", tail


@dataclass
class HoldoutBuilder:
    """What decides the Holdout, gathered document by document."""

    count: int = 0
    size: int = 0
    only: Document | None = None  # the first one, while it is the only one
    _lowest: float = 2.0
    _highest: float = -1.0
    _below: float = -1.0  # the second highest
    _any_kept: bool = False

    def add(self, document: Document, digest: bytes, fraction: float) -> None:
        unit = unit_hash(digest)
        self.only = None if self.count else document
        self.count += 1
        self.size += document.num_bytes
        self._lowest = min(self._lowest, unit)
        self._any_kept = self._any_kept or unit > fraction
        if unit > self._highest:
            self._below, self._highest = self._highest, unit
        elif unit != self._highest:
            self._below = max(self._below, unit)

    def copy(self) -> "HoldoutBuilder":
        return replace(self)

    def holdout(self, source: str, fraction: float) -> Holdout:
        """Raises InputError where there is nothing that could be split in two."""
        if self.size == 0:
            raise InputError(f"source {source!r} has no text in it; wanted at least two characters")
        threshold = fraction
        if self.count > 1:
            if self._lowest == self._highest:
                raise InputError(
                    f"source {source!r}: all {self.count} documents have the same text; "
                    "wanted two different ones, one to train on and one to hold out"
                )
            if self._lowest > fraction:
                threshold = self._lowest
            elif not self._any_kept:
                threshold = self._below
        held = Holdout(num_documents=self.count, num_bytes=self.size, fraction=fraction, threshold=threshold)
        if self.only is not None and not all(part.num_bytes for _, part in held.split(self.only)):
            raise InputError(
                f"{self.only.origin}: one character can't be split in two; wanted at least two to hold one out"
            )
        return held


def unit_hash(digest: bytes) -> float:
    """A hash as a number in [0, 1); 53 bits, so that no two of them round to the same one by accident."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

"""The first reading of a source: what each document's fate is, before anything is tokenised.

One byte a document is held in memory; its digest and size lie in a file while duplicates are looked for.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptjax.config.section import InputError
from gptjax.data.formats import CorruptData, Document
from gptjax.data.manifest import Report
from gptjax.data.records import Source
from gptjax.data.sources import ContentHash, ErrorBudget, Holdout, HoldoutBuilder, SplitName

TRAIN, VALIDATION, TOO_SHORT, TOO_LONG, DUPLICATE = range(5)  # fates; the last three are left out

_DOCUMENT = np.dtype([("high", ">u8"), ("low", ">u8"), ("size", "<u8")])  # half a SHA-256, and bytes of text
_BUCKET = 8 << 20  # documents whose digests are compared at a time
_CHUNK = 1 << 20  # documents read from the file at a time


@dataclass(frozen=True)
class Filters:
    """Which documents are left out; sizes are bytes of UTF-8, a max_bytes of 0 is none."""

    deduplicate: bool = True
    min_bytes: int = 1
    max_bytes: int = 0
    max_corrupt: int = 0


@dataclass(frozen=True)
class ScanResult:
    """What became of every document, in the order of the source without its corrupt units.

    `kept_bytes` counts the text that is tokenised, `skipped` are the indices of the corrupt units; content_sha256 is
    the identity of a source that is no file.
    """

    content_sha256: str
    held: Holdout
    kept_bytes: int
    report: Report
    skipped: tuple[int, ...]
    fates: np.ndarray

    def documents(self, source: Source, content: ContentHash | None = None) -> Iterator[tuple[SplitName, Document]]:
        """Yields the documents that are kept, each with its split; a single text as its head and its tail.

        Adds the digest of every document to `content`. Raises InputError where the source is not as it was.
        """
        number = 0
        for i, unit in enumerate(source.units):
            if i in self.skipped:
                continue
            for document in unit.read():
                if number == len(self.fates):
                    raise changed(source)
                fate = self.fates[number]
                number += 1
                if content is not None:
                    content.add(document.digest)
                if fate in (TRAIN, VALIDATION):
                    if self.held.num_documents == 1:
                        yield from self.held.split(document)
                    else:
                        yield "validation" if fate == VALIDATION else "train", document
        if number != len(self.fates):
            raise changed(source)

    def save(self, folder: Path) -> None:
        """Writes the scan; it is there whole once scan.json is."""
        self.fates.tofile(folder / "fates.uint8")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "fates"}
        values |= {"held": dataclasses.asdict(self.held), "report": dataclasses.asdict(self.report)}
        with (folder / "scan.json.partial").open("w", encoding="utf-8") as file:
            json.dump(values, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "scan.json.partial", folder / "scan.json")


def load_scan(folder: Path) -> ScanResult | None:
    """The scan that was saved into the folder, if one was."""
    if not (folder / "scan.json").is_file():
        return None
    values = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    values |= {"held": Holdout(**values["held"]), "report": Report.of(values["report"])}
    return ScanResult(
        **values | {"skipped": tuple(values["skipped"]), "fates": np.fromfile(folder / "fates.uint8", np.uint8)}
    )


def changed(source: Source) -> InputError:
    return InputError(f"source {source.name!r} changed while it was being read; prepare it again")


def scan(
    source: Source, fraction: float, filters: Filters, folder: Path, progress: Callable[[str, int, int], None]
) -> ScanResult:
    """Reads the source once; a file in `folder` takes 24 bytes a document meanwhile.

    A corrupt file is left out as a whole: what was read of it before the damage may be damaged too. Raises InputError
    where there are more than max_corrupt of them, and where the text can't be split in two.
    """
    path = folder / "documents.partial"
    with path.open("wb+") as file:
        reader = _Reader(source, fraction, filters, file, progress)
        reader.read()
        held = reader.tally.holdout(source.name, fraction)
        fates = np.frombuffer(reader.fates, np.uint8)
        kept_bytes = _decide(file, fates, held, filters.deduplicate)
    path.unlink()
    counts = np.bincount(fates, minlength=DUPLICATE + 1).tolist()
    report = Report(
        documents=len(fates),
        duplicates=counts[DUPLICATE],
        too_short=counts[TOO_SHORT],
        too_long=counts[TOO_LONG],
        corrupt=tuple(reader.corrupt.found),
    )
    return ScanResult(reader.content.hexdigest, held, kept_bytes, report, tuple(reader.skipped), fates)


class _Reader:
    """Gathers what the scan needs; a unit that turns out to be corrupt leaves no trace but its name."""

    def __init__(self, source: Source, fraction: float, filters: Filters, file: BinaryIO, progress: Callable):
        self.source, self.fraction, self.filters, self.file, self.progress = source, fraction, filters, file, progress
        self.tally, self.content, self.corrupt = HoldoutBuilder(), ContentHash(), ErrorBudget(filters.max_corrupt)
        self.fates, self.skipped, self.done = bytearray(), [], 0

    def read(self) -> None:
        for i, unit in enumerate(self.source.units):
            before = self.tally.copy(), self.content.copy(), len(self.fates)
            try:
                for document in unit.read():
                    self._add(document)
            except CorruptData as error:
                self.corrupt.add(error)
                self.skipped.append(i)
                self.tally, self.content, count = before
                del self.fates[count:]
                self.file.seek(count * _DOCUMENT.itemsize)
                self.file.truncate()

    def _add(self, document: Document) -> None:
        document.check()
        digest, size = document.digest, document.num_bytes
        self.content.add(digest)
        self.file.write(digest[:16] + size.to_bytes(8, "little"))
        if size < self.filters.min_bytes:
            fate = TOO_SHORT
        elif 0 < self.filters.max_bytes < size:
            fate = TOO_LONG
        else:
            fate = TRAIN
            self.tally.add(document, digest, self.fraction)
        self.fates.append(fate)
        if (self.done + size) >> 24 != self.done >> 24:  # every 16 MiB
            self.progress("reading", self.done + size, 0)
        self.done += size


def _decide(file: BinaryIO, fates: np.ndarray, held: Holdout, deduplicate: bool) -> int:
    """Marks duplicates and held-out documents among those not left out yet; returns the bytes of those kept."""
    file.flush()
    kept_bytes = 0
    if deduplicate:
        _mark_duplicates(file, fates)
    for start, documents in _chunks(file):
        part = fates[start : start + len(documents)]
        units = (documents["high"].astype(np.uint64) >> np.uint64(11)) / 2.0**53  # as sources.unit_hash
        part[(part == TRAIN) & (units <= held.threshold)] = VALIDATION
        kept_bytes += int(documents["size"][part <= VALIDATION].sum())
    return kept_bytes


def _mark_duplicates(file: BinaryIO, fates: np.ndarray) -> None:
    """Of documents with one digest (128 of its bits) the first is kept."""
    num_buckets = max(1, -(-len(fates) // _BUCKET))
    for bucket in range(num_buckets):
        found = []
        for start, documents in _chunks(file):
            high = documents["high"].astype(np.uint64)
            here = (high % np.uint64(num_buckets) == bucket) & (fates[start : start + len(documents)] == TRAIN)
            (at,) = np.nonzero(here)
            found.append((start + at, high[at], documents["low"][at].astype(np.uint64)))
        number, high, low = (np.concatenate(columns) for columns in zip(*found))
        order = np.lexsort((low, high))  # stable: equal digests stay in the order of the source
        number, high, low = number[order], high[order], low[order]
        again = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        fates[number[1:][again]] = DUPLICATE


def _chunks(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yields the documents written so far with the number of the first, some at a time."""
    file.seek(0)
    start = 0
    while len(documents := np.frombuffer(file.read(_CHUNK * _DOCUMENT.itemsize), _DOCUMENT)):
        yield start, documents
        start += len(documents)

"""The first reading of a source: the status of each document, before anything is tokenised.

One byte a document is held in memory; its digest and size lie in a file while duplicates are looked for.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptjax.config.section import InputError
from gptjax.data.formats import CorruptData, Document
from gptjax.data.holdout import CUT, SPLITS, TRAIN, VALIDATION, SplitName, choose_holdout, content_hash
from gptjax.data.manifest import Report
from gptjax.data.records import Source
from gptjax.data.sources import ErrorBudget
from gptjax.storage import write_json

TOO_SHORT, TOO_LONG, DUPLICATE = range(CUT + 1, CUT + 4)  # further status of a document: it is left out

_DOCUMENT = np.dtype([("high", ">u8"), ("low", ">u8"), ("size", "<u8")])  # half a SHA-256, and bytes of text
_BUCKET = 8 << 20  # documents whose digests are compared at a time
_CHUNK = 1 << 20  # documents read from the file at a time


@dataclass(frozen=True)
class Filters:
    """Conditions under which documents are left out; sizes are bytes of UTF-8, a max_bytes of 0 is none."""

    deduplicate: bool = True
    min_bytes: int = 1
    max_bytes: int = 0
    max_corrupt: int = 0


@dataclass(frozen=True)
class ScanResult:
    """The status of every document (uint8), in the order of the source without its corrupt files.

    `kept_bytes` counts the text that is tokenised, `skipped` are the indices of the corrupt files; content_sha256 is
    the identity of a source that is no file.
    """

    content_sha256: str
    fraction: float
    kept_bytes: int
    report: Report
    skipped: tuple[int, ...]
    status: np.ndarray

    def documents(self, source: Source, content: "hashlib._Hash | None" = None) -> Iterator[tuple[SplitName, Document]]:
        """Yields the documents that are kept, each with its split; one that is cut as its head and its tail.

        Adds the digest of every document to `content`. Raises InputError where the source is not as it was.
        """
        number = 0
        for i, file in enumerate(source.files):
            if i in self.skipped:
                continue
            for document in file.read():
                if number == len(self.status):
                    raise changed(source)
                status = self.status[number]
                number += 1
                if content is not None:
                    content.update(document.digest)
                if status == CUT:
                    yield from zip(SPLITS, document.split_tail(self.fraction))
                elif status < CUT:
                    yield SPLITS[status], document
        if number != len(self.status):
            raise changed(source)

    def save(self, folder: Path) -> None:
        """Writes the scan; it is there whole once scan.json is."""
        self.status.tofile(folder / "status.uint8")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "status"}
        values["report"] = dataclasses.asdict(self.report)
        write_json(folder / "scan.json", values)


def load_scan(folder: Path) -> ScanResult | None:
    """The scan that was saved into the folder, if one was."""
    if not (folder / "scan.json").is_file():
        return None
    values = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    values |= {"report": Report.of(values["report"]), "skipped": tuple(values["skipped"])}
    values["status"] = np.fromfile(folder / "status.uint8", np.uint8)
    return ScanResult(**values)


def changed(source: Source) -> InputError:
    """The error for a source that is not as it was when it was read first."""
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
        reader = _Reader(source, filters, file, progress)
        reader.read()
        status = np.frombuffer(reader.status, np.uint8)
        if filters.deduplicate:
            _mark_duplicates(file, status)
        if source.has_validation:
            kept_bytes = _check_splits(file, status, source.name)
        else:
            kept_bytes = _hold_out(file, status, source.name, fraction)
    path.unlink()
    counts = np.bincount(status, minlength=DUPLICATE + 1).tolist()
    report = Report(
        documents=len(status),
        duplicates=counts[DUPLICATE],
        too_short=counts[TOO_SHORT],
        too_long=counts[TOO_LONG],
        corrupt=tuple(reader.corrupt.errors),
        notes=source.notes,
    )
    return ScanResult(reader.content.hexdigest(), fraction, kept_bytes, report, tuple(reader.skipped), status)


def scan_for_training(source: Source, fraction: float, max_corrupt: int) -> ScanResult:
    """The scan of a source whose text a tokenizer is trained on; it leaves no file."""
    with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
        return scan(source, fraction, Filters(max_corrupt=max_corrupt), Path(folder), lambda what, done, total: None)


class _Reader:
    """State of a scan; a file that turns out to be corrupt leaves no trace in it but its name."""

    def __init__(self, source: Source, filters: Filters, file: BinaryIO, progress: Callable):
        self.source, self.filters, self.file, self.progress = source, filters, file, progress
        self.content, self.corrupt = content_hash(), ErrorBudget(filters.max_corrupt)
        self.status, self.skipped, self.done = bytearray(), [], 0

    def read(self) -> None:
        for i, source_file in enumerate(self.source.files):
            before = self.content.copy(), len(self.status)
            try:
                for document in source_file.read():
                    self._add(document, VALIDATION if source_file.validation else TRAIN)
            except CorruptData as error:
                self.corrupt.add(error)
                self.skipped.append(i)
                self.content, count = before
                del self.status[count:]
                self.file.seek(count * _DOCUMENT.itemsize)
                self.file.truncate()

    def _add(self, document: Document, status: int) -> None:
        document.check()
        digest, size = document.digest, document.num_bytes
        self.content.update(digest)
        self.file.write(digest[:16] + size.to_bytes(8, "little"))
        if size < self.filters.min_bytes:
            status = TOO_SHORT
        elif 0 < self.filters.max_bytes < size:
            status = TOO_LONG
        self.status.append(status)
        if (self.done + size) >> 24 != self.done >> 24:  # every 16 MiB
            self.progress("reading", self.done + size, 0)
        self.done += size


def _hold_out(file: BinaryIO, status: np.ndarray, source: str, fraction: float) -> int:
    """Marks held-out documents among those not left out; returns the bytes of all that are kept."""

    def kept() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, documents in _chunks(file):
            kept = status[start : start + len(documents)] <= CUT
            yield _unit_hashes(documents["high"])[kept], documents["size"][kept].astype(np.int64)

    holdout = choose_holdout(source, fraction, kept)
    for start, documents in _chunks(file):
        part = status[start : start + len(documents)]
        own = holdout.status(_unit_hashes(documents["high"]), documents["size"])
        part[part == TRAIN] = own[part == TRAIN]
    return sum(int(sizes.sum()) for _, sizes in kept())


def _unit_hashes(high: np.ndarray) -> np.ndarray:
    return (high.astype(np.uint64) >> np.uint64(11)) / 2.0**53  # as holdout.unit_hash


def _check_splits(file: BinaryIO, status: np.ndarray, source: str) -> int:
    """The bytes that are kept of a source with a validation split of its own; raises InputError for a split without."""
    total = 0
    for split, name in enumerate(SPLITS):
        size = sum(int(d["size"][status[start : start + len(d)] == split].sum()) for start, d in _chunks(file))
        if not size:
            raise InputError(f"source {source!r} has no text to keep in its {name} split; wanted at least one document")
        total += size
    return total


def _mark_duplicates(file: BinaryIO, status: np.ndarray) -> None:
    """Of documents with one digest (128 of its bits) the first is kept."""
    num_buckets = max(1, -(-len(status) // _BUCKET))
    for bucket in range(num_buckets):
        rows = []
        for start, documents in _chunks(file):
            high = documents["high"].astype(np.uint64)
            own = (high % np.uint64(num_buckets) == bucket) & (status[start : start + len(documents)] <= CUT)
            (index,) = np.nonzero(own)
            rows.append((start + index, high[index], documents["low"][index].astype(np.uint64)))
        number, high, low = (np.concatenate(columns) for columns in zip(*rows))
        order = np.lexsort((low, high))  # stable: equal digests stay in the order of the source
        number, high, low = number[order], high[order], low[order]
        repeated = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        status[number[1:][repeated]] = DUPLICATE


def _chunks(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yields the documents written so far with the number of the first, some at a time."""
    file.flush()
    file.seek(0)
    start = 0
    while len(documents := np.frombuffer(file.read(_CHUNK * _DOCUMENT.itemsize), _DOCUMENT)):
        yield start, documents
        start += len(documents)

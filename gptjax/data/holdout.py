"""The hold-out of a source by the text of its documents, and the identity of a source that is no file."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gptjax.config.section import InputError
from gptjax.data.formats import Document

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")


def content_hash() -> "hashlib._Hash":
    """The identity of a source that is no file: a SHA-256 to be updated with the digests of its documents in order."""
    return hashlib.sha256(b"documents\n")


@dataclass(frozen=True)
class Holdout:
    """The text that is held out of training: the tail of a single document, or the documents with a low hash.

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
    """The statistics that decide a Holdout, gathered document by document."""

    count: int = 0
    size: int = 0
    only: Document | None = None  # the first one, while it is the only one
    _lowest: float = 2.0
    _highest: float = -1.0
    _below: float = -1.0  # the second highest
    _any_kept: bool = False

    def add(self, document: Document, digest: bytes, fraction: float) -> None:
        value = unit_hash(digest)
        self.only = None if self.count else document
        self.count += 1
        self.size += document.num_bytes
        self._lowest = min(self._lowest, value)
        self._any_kept = self._any_kept or value > fraction
        if value > self._highest:
            self._below, self._highest = self._highest, value
        elif value != self._highest:
            self._below = max(self._below, value)

    def holdout(self, source: str, fraction: float) -> Holdout:
        """The finished hold-out; raises InputError where there is nothing that could be split in two."""
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
        holdout = Holdout(num_documents=self.count, num_bytes=self.size, fraction=fraction, threshold=threshold)
        if self.only is not None and not all(part.num_bytes for _, part in holdout.split(self.only)):
            raise InputError(
                f"{self.only.origin}: one character can't be split in two; wanted at least two to hold one out"
            )
        return holdout


def unit_hash(digest: bytes) -> float:
    """A hash as a number in [0, 1); 53 bits, so that no two of them round to the same one by accident."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

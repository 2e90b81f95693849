"""The hold-out of a source by the text of its documents, and the identity of a source that is no file."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gptjax.config.section import InputError

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")
TRAIN, VALIDATION, CUT = range(3)  # status of a document; one that is cut gives its tail to the validation split

_LONGEST_CHARACTER = 4  # bytes of UTF-8; a text that is longer can be cut


def content_hash() -> "hashlib._Hash":
    """The identity of a source that is no file: a SHA-256 to be updated with the digests of its documents in order."""
    return hashlib.sha256(b"documents\n")


@dataclass(frozen=True)
class Holdout:
    """The text that is held out of training: documents with a low hash, and of long documents the tail.

    A document's hash is a number in [0, 1) made from its text alone, so neither order nor names matter and equal texts
    stay together. Up to `longest` bytes it is validation as a whole where the hash is at most `threshold`; a longer one
    is cut, and the last `fraction` of it is validation.
    """

    fraction: float
    threshold: float
    longest: float

    def status(self, hashes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """TRAIN, VALIDATION or CUT for each document: uint8."""
        whole = np.where(hashes <= self.threshold, VALIDATION, TRAIN)
        return np.where(sizes > self.longest, CUT, whole).astype(np.uint8)


Documents = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Gives hashes (float64) and sizes (int64) of the documents, some at a time, the same ones at each call."""


def choose_holdout(source: str, fraction: float, documents: Documents) -> Holdout:
    """The hold-out of documents, whose bytes are near to `fraction` of all: half to twice, up to a fraction of a half.

    Longer than all that is to be held out are only documents of small sources: they are cut. The threshold is the
    fraction itself, so that more documents change no other's split, unless too few documents make another share of
    it; then the documents of lowest hash are held out whose bytes come nearest. Raises InputError where there is no
    text, or none that could be split in two.
    """
    total = sum(int(sizes.sum()) for _, sizes in documents())
    if total == 0:
        raise InputError(f"source {source!r} has no text in it; wanted at least two characters")
    longest = max(fraction * total, _LONGEST_CHARACTER)
    short = held = 0
    for hashes, sizes in documents():
        short += int(sizes[sizes <= longest].sum())
        held += int(sizes[(sizes <= longest) & (hashes <= fraction)].sum())
    tails = fraction * (total - short)
    if is_near((held + tails) / total, fraction) and (tails or 0 < held < short):
        return Holdout(fraction, fraction, longest)
    few = [(hashes[sizes <= longest], sizes[sizes <= longest]) for hashes, sizes in documents()]
    hashes, sizes = (np.concatenate(column) for column in zip(*few))
    order = np.argsort(hashes)
    values, first = np.unique(hashes[order], return_index=True)
    bytes_below = np.concatenate([[0], np.cumsum(sizes[order])])[np.append(first, len(order))]
    thresholds = np.concatenate([[-1.0], values])  # bytes_below[i] is held out with thresholds[i]
    if not tails:  # each split needs a document
        inside = (0 < bytes_below) & (bytes_below < short)
        thresholds, bytes_below = thresholds[inside], bytes_below[inside]
    if not len(thresholds):
        raise InputError(
            f"source {source!r}: its {total} bytes of text can't be split in two; wanted two different texts, or a "
            "longer one"
        )
    nearest = int(np.argmin(np.abs(bytes_below - fraction * short)))
    return Holdout(fraction, float(thresholds[nearest]), longest)


def is_near(share: float, fraction: float) -> bool:
    """True for a share of the text that is off by at most a factor of two."""
    return fraction / 2 <= share <= 2 * fraction


def share_notice(held: int, total: int, fraction: float) -> list[str]:
    """A line where the bytes that are held out are not near to the fraction that was asked for."""
    if not total or is_near(held / total, fraction):
        return []
    return [
        f"HELD OUT IS {held / total:.1%} OF THE TEXT, though validation_fraction asks for {fraction:.1%}: there are "
        "too few documents, or too short ones"
    ]


def unit_hash(digest: bytes) -> float:
    """A hash as a number in [0, 1); 53 bits, so that no two of them round to the same one by accident."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

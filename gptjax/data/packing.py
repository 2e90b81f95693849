"""Rows of a fixed length cut from token streams: inputs, targets, positions, segments and loss weights, in numpy.

A row is made of spans. A span is a run of predictions inside a token stream: (row, column, start, count) predicts
stream[start + 1 : start + count + 1] from stream[start : start + count]. No Python loop runs over tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError

Batch = dict[str, np.ndarray]


class Stream(Protocol):
    """A token stream in which documents begin at `starts` (int64, rising, the first is 0)."""

    @property
    def starts(self) -> np.ndarray: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...


class Spans(NamedTuple):
    """Runs of predictions, one an element: int64 arrays of the same size."""

    row: np.ndarray
    column: np.ndarray
    start: np.ndarray
    count: np.ndarray


def cut(stream: Stream, spans: Spans, num_rows: int, length: int, cross_documents: bool = False) -> Batch:
    """A batch of num_rows rows with each span in its place; what no span covers is padding.

    inputs_BL, targets_BL int32; positions_BL int32, from 0 in each document or span; segments_BL int32, 1, 2, 3, ...
    for the documents of a row and 0 for padding; weights_BL float32, 0 for padding and where the target belongs to
    another document than its input. With cross_documents a row is one segment with running positions and no other
    zero weights than the padding's. Spans of a row must be in the order of their columns and not overlap. Where the
    stream has a hole (a token below 0) the input is padding, and neither it nor its neighbour is predicted.
    """
    inputs_BL = np.zeros((num_rows, length), np.int32)
    targets_BL = np.zeros((num_rows, length), np.int32)
    for row, column, start, count in zip(*(x.tolist() for x in spans)):
        tokens = stream.tokens(start, start + count + 1)
        inputs_BL[row, column : column + count] = tokens[:-1]
        targets_BL[row, column : column + count] = tokens[1:]
    covered_BL = _covered(spans, num_rows, length)
    begins_BL, ends_BL = np.zeros((2, num_rows, length), np.bool_)
    if cross_documents:
        begins_BL[:, 0] = True
    else:
        row, column, inside = _document_starts(stream.starts, spans)
        begins_BL[spans.row, spans.column] = True
        begins_BL[row[inside], column[inside]] = True
        ends_BL[row, column - 1] = True
    columns_L = np.arange(length, dtype=np.int32)
    if inputs_BL.min(initial=0) < 0 or targets_BL.min(initial=0) < 0:
        ends_BL |= (inputs_BL < 0) | (targets_BL < 0)
        covered_BL &= inputs_BL >= 0
        inputs_BL, targets_BL = np.maximum(inputs_BL, 0), np.maximum(targets_BL, 0)
    positions_BL = columns_L - np.maximum.accumulate(np.where(begins_BL, columns_L, np.int32(0)), axis=1)
    segments_BL = np.cumsum(begins_BL, axis=1, dtype=np.int32)
    return {
        "inputs_BL": inputs_BL,
        "targets_BL": targets_BL,
        "positions_BL": np.where(covered_BL, positions_BL, np.int32(0)),
        "segments_BL": np.where(covered_BL, segments_BL, np.int32(0)),
        "weights_BL": (covered_BL & ~ends_BL).astype(np.float32),
    }


def example_batch(num_rows: int, length: int, vision: VisionConfig | None = None, images: int = 0) -> Batch:
    """Names, shapes and types of the batches of `cut`, with nothing read and nothing allocated.

    With `images` a row those of rows of images, as `image_rows.ImageRows` makes them.
    """
    whole = np.broadcast_to(np.int32(0), (num_rows, length))
    names = ("inputs_BL", "targets_BL", "positions_BL", "segments_BL")
    batch = dict.fromkeys(names, whole) | {"weights_BL": np.broadcast_to(np.float32(0), whole.shape)}
    if vision is None or not images:
        return batch
    shape = num_rows, images, vision.num_patches, vision.patch_size
    more = dict.fromkeys(("index_BL", "last_BL", "until_BL"), whole)
    return batch | more | {"patches_BIPY": np.broadcast_to(np.uint8(0), shape)}


def _covered(spans: Spans, num_rows: int, length: int) -> np.ndarray:
    """Places that some span covers, by adding up where spans open and close."""
    edges_BL = np.zeros((num_rows, length + 1), np.int8)
    # Spans that meet cancel out; no two open, and no two close, in the same place.
    edges_BL[spans.row, spans.column] += 1
    edges_BL[spans.row, spans.column + spans.count] -= 1
    return np.cumsum(edges_BL[:, :-1], axis=1, dtype=np.int8).astype(np.bool_)


def _document_starts(starts: np.ndarray, spans: Spans) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents that begin behind a span's first input: row, column, and whether the first token is an input too.

    Where it is only the span's last target, the column lies one behind the span.
    """
    first = np.searchsorted(starts, spans.start, side="right")
    count = np.searchsorted(starts, spans.start + spans.count, side="right") - first
    span = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(span)) - np.repeat(np.cumsum(count) - count, count) + first[span]
    column = spans.column[span] + starts[number] - spans.start[span]
    return spans.row[span], column, column < (spans.column + spans.count)[span]


class MemorySplit:
    """A token stream in memory, of so many bytes of text."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, num_bytes: int = 0):
        self._tokens, self.starts = tokens, starts
        self.num_tokens, self.num_documents, self.num_bytes = len(tokens), len(starts), num_bytes

    @staticmethod
    def of(documents: Sequence[Sequence[int] | np.ndarray]) -> "MemorySplit":
        """The documents end to end."""
        sizes = np.array([len(document) for document in documents], np.int64)
        tokens = np.concatenate([np.asarray(document, np.int32) for document in documents])
        return MemorySplit(tokens, np.cumsum(sizes) - sizes)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32."""
        return self._tokens[start:stop]


def pack_documents(docs: Sequence[Sequence[int]], length: int) -> Batch:
    """Rows that hold whole documents, each in the first row with room for it (first fit)."""
    counts = _predictions(docs, length)
    filled: list[int] = []
    rows, columns = [], []
    for count in counts:
        row = next((i for i, used in enumerate(filled) if used + count <= length), len(filled))
        if row == len(filled):
            filled.append(0)
        rows.append(row)
        columns.append(filled[row])
        filled[row] += count
    stream = MemorySplit.of(docs)
    spans = Spans(np.array(rows), np.array(columns), stream.starts, np.array(counts))
    return cut(stream, spans, len(filled), length)


def pad_documents(docs: Sequence[Sequence[int]], length: int) -> Batch:
    """One whole document a row, padded to the length."""
    counts = _predictions(docs, length)
    stream = MemorySplit.of(docs)
    spans = Spans(np.arange(len(docs)), np.zeros(len(docs), np.int64), stream.starts, np.array(counts))
    return cut(stream, spans, len(docs), length)


def batch_hash(batch: Batch) -> str:
    """SHA-256 over the names, shapes, types and values of a batch, in hex."""
    total = hashlib.sha256()
    for name in sorted(batch):
        value = np.ascontiguousarray(batch[name])
        total.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def _predictions(docs: Sequence[Sequence[int]], length: int) -> list[int]:
    """Predicted tokens of each document: all but its first."""
    counts = [len(doc) - 1 for doc in docs]
    for number, count in enumerate(counts):
        if not 1 <= count <= length:
            raise InputError(f"document {number} has {count + 1} tokens; wanted 2 to data.length + 1 = {length + 1}")
    if not counts:
        raise InputError("there are no documents to put into rows; wanted at least one")
    return counts

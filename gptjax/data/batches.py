"""The rows that a training step reads: a pure function of corpus, seed, rows read before, batch size and row length.

An epoch's rows are cut so that each target is predicted exactly once, and visited in an order of the epoch's own.
Neither the number of hosts nor of threads changes a batch. From a pipeline's `batches` to a token it goes through
`batches` here, `Mixture.rows` (the source of each row), `RowSampler.rows` (where its tokens lie), `packing.cut` (the
arrays) and `CorpusSplit.tokens` (the pages).
"""

import contextlib
import functools
import itertools
from collections.abc import Generator, Iterator
from typing import Any, Protocol

import numpy as np

from gptjax.config import DataConfig
from gptjax.config.section import InputError
from gptjax.data.packing import Batch, Spans, Stream, cut
from gptjax.data.permutation import ROUNDS, mix_integers, permute
from gptjax.data.prefetch import prefetch

RowSlice = slice | np.ndarray  # some rows of a batch: their indices in it, rising
DataState = dict[str, Any]  # of the data after some batches; JSON, saved with the checkpoint of the last one trained on

ALL_ROWS = slice(None)

_GROUP_TOKENS = 1 << 13  # tokens cut at a time: numpy's overhead is that of a call, whatever its size


class TokenSplit(Stream, Protocol):
    """A split of a corpus: a stream and its size."""

    num_tokens: int


class RowSource(Protocol):
    """Rows by number, counted on through the epochs, and the batches that are made of them."""

    cfg: DataConfig

    def rows(self, number: np.ndarray) -> Batch: ...


class RowSampler:
    """The rows of a split in the order of training."""

    def __init__(self, split: TokenSplit, cfg: DataConfig, seed: int):
        self.cfg, self.seed = cfg, seed
        if cfg.packing == "packed" and split.num_tokens <= cfg.length:
            raise InputError(
                f"data.length={cfg.length}: the training split has only {split.num_tokens} tokens; wanted more than "
                f"one row of them; give more text, or a shorter row with --data.length {max(1, split.num_tokens // 8)}"
            )
        self._layout = _layout(split, cfg.length, cfg.packing)
        self.split = split

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold each target of the split once."""
        return self._layout.num_rows

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The batch that begins with row `first`, or some rows of it, as `packing.cut` describes it."""
        return self.rows(row_numbers(self.cfg, first, part))

    def rows(self, number: np.ndarray) -> Batch:
        """The rows with these numbers (int64, rising) as a batch."""
        return cut(self.split, self.spans(number), len(number), self.cfg.length, self.cfg.cross_documents)

    def spans(self, number: np.ndarray) -> Spans:
        """The places in the split's stream of the rows with these numbers (rising)."""
        epochs, indices = np.divmod(number, self.rows_per_epoch)
        columns, first = [], 0
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            stop = int(np.searchsorted(epochs, epoch, side="right"))
            permuted = permute(indices[first:stop], self.rows_per_epoch, self.seed, epoch)
            spans = self._layout.spans(permuted, self._layout.shift(self.seed, epoch))
            columns.append(spans._replace(row=spans.row + first))
            first = stop
        return Spans(*(np.concatenate(column) for column in zip(*columns)))

    def num_targets(self, number: np.ndarray) -> int:
        """Targets with weight in these rows, by where documents begin: no token is read."""
        spans = self.spans(number)
        count = spans.count.sum()
        if not self.cfg.cross_documents:
            starts, stop = self.split.starts, spans.start + spans.count
            count -= (np.searchsorted(starts, stop, "right") - np.searchsorted(starts, spans.start, "right")).sum()
        return int(count)


def row_numbers(cfg: DataConfig, first: int, part: RowSlice = ALL_ROWS) -> np.ndarray:
    """Numbers of the rows of the batch that begins with row `first`, or of some of them: int64[rows]."""
    return first + np.arange(cfg.batch_size)[part]


def slice_rows(batch: Batch, part: RowSlice) -> Batch:
    """Some rows of a batch; a slice, and all of them, copies nothing."""
    if not isinstance(part, slice) and len(part) == len(next(iter(batch.values()))):
        return batch
    return {name: x[part] for name, x in batch.items()}


def batches(
    source: RowSource, start: int, part: RowSlice = ALL_ROWS, workers: int = 0
) -> Generator[tuple[Batch, DataState], None, None]:
    """Yields (batch, state after it) from row `start` on, without end; {"rows": n} is the state after n rows.

    With a `part` only those rows of each batch are read and cut. Threads, as many as `workers` and at least one, cut
    the next batches meanwhile; their number changes no batch and no order. An exception of one batch is raised in its
    place. Closing the iterator ends the threads.
    """
    size, batch_size = len(row_numbers(source.cfg, 0, part)), source.cfg.batch_size
    group_size = max(1, _GROUP_TOKENS // (size * source.cfg.length))

    def cut_group(first: int) -> tuple[int, Batch | None]:
        """The rows of group_size batches; None where one of them raises, which it does again in its place."""
        firsts = range(first, first + group_size * batch_size, batch_size)
        try:
            return first, source.rows(np.concatenate([row_numbers(source.cfg, row, part) for row in firsts]))
        except Exception:
            return first, None

    calls = (functools.partial(cut_group, first) for first in itertools.count(start, group_size * batch_size))
    with contextlib.closing(prefetch(calls, workers)) as groups:
        for first, group in groups:
            for i in range(group_size):
                if group is None:
                    batch = source.rows(row_numbers(source.cfg, first + i * batch_size, part))
                else:
                    batch = {name: x[i * size : (i + 1) * size] for name, x in group.items()}
                yield batch, {"rows": first + (i + 1) * batch_size}


def validation_batches(
    split: TokenSplit, cfg: DataConfig, max_rows: int = 0, part: RowSlice = ALL_ROWS
) -> Iterator[Batch]:
    """Yields the split's rows in order, each target once, or only the first max_rows rows; of each batch some rows.

    The last batch is filled with rows of padding, so that all have the same shape.
    """
    indices = np.arange(cfg.batch_size)[part]
    layout = _layout(split, cfg.length, cfg.packing)
    num_rows = min(layout.num_rows, max_rows) if max_rows else layout.num_rows
    for first in range(0, num_rows, cfg.batch_size):
        rows = first + indices
        yield cut(split, layout.spans(rows[rows < num_rows], 0), len(indices), cfg.length, cfg.cross_documents)


class _PackedLayout:
    """Rows that are cuts of the stream, joined end to end into a ring of predictions.

    Row r covers predictions shift + [r length, (r + 1) length); the last row has what is left over, and the row in
    which the ring closes has two spans.
    """

    def __init__(self, split: TokenSplit, length: int):
        self.length, self.predictions = length, split.num_tokens - 1
        self.num_rows = -(-self.predictions // length)

    def shift(self, seed: int, epoch: int) -> int:
        """The place of an epoch's first cut: from 0 up to, not including, the length."""
        return mix_integers(seed, epoch, ROUNDS) % self.length

    def spans(self, rows: np.ndarray, shift: int) -> Spans:
        first = rows * self.length
        count = np.minimum(self.length, self.predictions - first)
        start = (first + shift) % self.predictions
        head = np.minimum(count, self.predictions - start)
        (closing,) = np.nonzero(head < count)
        number = np.arange(len(rows))
        zeros = np.zeros_like(head)
        return Spans(
            row=np.concatenate([number, closing]),
            column=np.concatenate([zeros, head[closing]]),
            start=np.concatenate([start, zeros[closing]]),
            count=np.concatenate([head, (count - head)[closing]]),
        )


class _PaddedLayout:
    """Rows with one document, or one slice of it, each."""

    def __init__(self, split: TokenSplit, length: int):
        self.length, self.starts = length, split.starts
        self.predictions = np.diff(split.starts, append=split.num_tokens) - 1
        self.rows_before = np.cumsum(-(-self.predictions // length))  # up to and with each document
        self.num_rows = int(self.rows_before[-1])

    def shift(self, seed: int, epoch: int) -> int:
        return 0

    def spans(self, rows: np.ndarray, shift: int) -> Spans:
        del shift  # slices always begin where their document does
        document = np.searchsorted(self.rows_before, rows, side="right")
        slices = -(-self.predictions[document] // self.length)
        skipped = (rows - (self.rows_before[document] - slices)) * self.length
        count = np.minimum(self.length, self.predictions[document] - skipped)
        return Spans(np.arange(len(rows)), np.zeros_like(count), self.starts[document] + skipped, count)


def _layout(split: TokenSplit, length: int, packing: str) -> _PackedLayout | _PaddedLayout:
    return _PackedLayout(split, length) if packing == "packed" else _PaddedLayout(split, length)

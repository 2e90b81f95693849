"""Which rows a training step reads: a pure function of the corpus, the seed, the step, the batch size and the length.

An epoch's rows are cut so that each target is predicted exactly once, and visited in an order of the epoch's own.
Neither the number of hosts nor who reads ahead changes a batch.
"""

import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from gptjax.config import DataConfig
from gptjax.config.section import InputError
from gptjax.data.packing import Batch, Spans, Stream, cut

T = TypeVar("T")
RowSlice = slice | np.ndarray  # some rows of a batch: their numbers in it, rising
DataState = dict[str, Any]  # of the data after some batches; JSON, saved with the checkpoint of the last one trained on

ALL_ROWS = slice(None)

_ROUNDS = 8
_AHEAD = 2  # makings ahead of what is asked for, besides one for each further thread
_TOGETHER = 1 << 13  # tokens cut at a time: numpy's overhead is that of a call, whatever its size


class TokenSplit(Stream, Protocol):
    """A corpus's split: a stream and its size."""

    num_tokens: int


class RowSampler:
    """The rows of a split in the order that training reads them."""

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

    def batch(self, step: int, rows: RowSlice = ALL_ROWS) -> Batch:
        """The batch that is trained on after `step` steps, or some rows of it; what `packing.cut` describes."""
        return self.rows(row_numbers(self.cfg, step, rows))

    def several(self, steps: range, rows: RowSlice = ALL_ROWS) -> list[Batch]:
        """The batches of these steps, cut at once."""
        return separate(self.rows(numbers_of(self.cfg, steps, rows)), len(steps))

    def rows(self, number: np.ndarray) -> Batch:
        """The rows with these numbers (int64, counted on through the epochs) as a batch."""
        return cut(self.split, self.spans(number), len(number), self.cfg.length, self.cfg.cross_documents)

    def targets(self, number: np.ndarray) -> np.ndarray:
        """How many targets of each of these rows have weight (int64), by where documents begin: no token is read."""
        spans = self.spans(number)
        count = spans.count
        if not self.cfg.cross_documents:
            starts, stop = self.split.starts, spans.start + spans.count
            count = count - np.searchsorted(starts, stop, side="right") + np.searchsorted(starts, spans.start, "right")
        return np.bincount(spans.row, count, minlength=len(number)).astype(np.int64)

    def spans(self, number: np.ndarray) -> Spans:
        """Where the rows with these numbers (rising) lie in the split's stream."""
        epochs, places = np.divmod(number, self.rows_per_epoch)
        parts, at = [], 0
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            stop = int(np.searchsorted(epochs, epoch, side="right"))
            chosen = permute(places[at:stop], self.rows_per_epoch, self.seed, epoch)
            spans = self._layout.spans(chosen, self._layout.shift(self.seed, epoch))
            parts.append(spans._replace(row=spans.row + at))
            at = stop
        return parts[0] if len(parts) == 1 else Spans(*(np.concatenate(column) for column in zip(*parts)))


def row_numbers(cfg: DataConfig, step: int, rows: RowSlice = ALL_ROWS) -> np.ndarray:
    """Numbers of the rows that are trained on after `step` steps, or of some of them: int64[rows]."""
    return step * cfg.batch_size + np.arange(cfg.batch_size)[rows]


def numbers_of(cfg: DataConfig, steps: range, rows: RowSlice = ALL_ROWS) -> np.ndarray:
    """Numbers of the rows of several steps, one step after the other."""
    return np.concatenate([row_numbers(cfg, step, rows) for step in steps])


def separate(rows: Batch, count: int) -> list[Batch]:
    """So many batches of equal size from their rows, one batch after the other; nothing is copied."""
    size = len(rows["inputs_BL"]) // count
    return [{name: x[i * size : (i + 1) * size] for name, x in rows.items()} for i in range(count)]


def slice_rows(batch: Batch, part: RowSlice) -> Batch:
    """Some rows of a batch that is there; a slice, and all of them, copies nothing."""
    if not isinstance(part, slice) and len(part) == len(next(iter(batch.values()))):
        return batch
    return {name: x[part] for name, x in batch.items()}


def validation_batches(
    split: TokenSplit, cfg: DataConfig, max_rows: int = 0, part: RowSlice = ALL_ROWS
) -> Iterator[Batch]:
    """Yields the split's rows in order, each target once, or only the first max_rows rows; of each batch some rows.

    The last batch is filled with rows of padding, so that all have the same shape.
    """
    mine = np.arange(cfg.batch_size)[part]
    layout = _layout(split, cfg.length, cfg.packing)
    num_rows = min(layout.num_rows, max_rows) if max_rows else layout.num_rows
    for first in range(0, num_rows, cfg.batch_size):
        rows = first + mine
        yield cut(split, layout.spans(rows[rows < num_rows], 0), len(mine), cfg.length, cfg.cross_documents)


class Batches(Protocol):
    """Batches that are a pure function of the step; `several` gives those of some steps, made together."""

    cfg: DataConfig

    def batch(self, step: int, rows: RowSlice = ALL_ROWS) -> Batch: ...

    def several(self, steps: range, rows: RowSlice = ALL_ROWS) -> list[Batch]: ...


def batches(
    rows: Batches, start_step: int, part: RowSlice = ALL_ROWS, workers: int = 0
) -> Generator[tuple[Batch, DataState], None, None]:
    """Yields (batch, state after it) from a step on, without end; {"step": s} is the state after s steps.

    With a `part` only those rows of each batch are read and cut.

    Threads, as many as `workers` and at least one, cut the next batches meanwhile; their number changes no batch and
    no order. What one raises is raised here, in its batch's place. Closing the iterator ends the threads.
    """

    together = max(1, _TOGETHER // (len(row_numbers(rows.cfg, 0, part)) * rows.cfg.length))

    def make(first: int) -> tuple[range, list[Batch]]:
        steps = range(first, first + together)
        try:
            return steps, rows.several(steps, part)
        except Exception:  # of one of them, which raises it again in its place; the others are good
            return steps, []

    firsts = itertools.count(start_step, together)
    with contextlib.closing(prefetch((functools.partial(make, first) for first in firsts), workers)) as groups:
        for steps, made in groups:
            for i, step in enumerate(steps):
                yield made[i] if made else rows.batch(step, part), {"step": step + 1}


def prefetch(makes: Iterator[Callable[[], T]], workers: int = 0) -> Generator[T, None, None]:
    """Yields what each function makes, in order, while threads call the next ones; with one thread also in order."""
    threads = max(1, workers)
    ready: collections.deque[Future[T]] = collections.deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")
    try:
        while True:
            while len(ready) < threads + _AHEAD:
                ready.append(pool.submit(next(makes)))
            yield ready.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Packed:
    """Rows that are cuts of the stream, joined end to end into a ring of predictions.

    Row r covers predictions shift + [r length, (r + 1) length); the last row has what is left over, and the row in
    which the ring closes has two spans.
    """

    def __init__(self, split: TokenSplit, length: int):
        self.length, self.predictions = length, split.num_tokens - 1
        self.num_rows = -(-self.predictions // length)

    def shift(self, seed: int, epoch: int) -> int:
        """Where the epoch's first cut lies: from 0 up to, not including, the length."""
        return mixed_key(seed, epoch, _ROUNDS) % self.length

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


class _Padded:
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


def _layout(split: TokenSplit, length: int, packing: str) -> _Packed | _Padded:
    return _Packed(split, length) if packing == "packed" else _Padded(split, length)


def permute(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of range(size), drawn from (seed, epoch), takes each place; int64.

    A generalised Feistel network over pairs (left, right), left < a and right < b with a b >= size, walked until
    it lands below size (Black & Rogaway 2002, Ciphers with Arbitrary Finite Domains). It needs no table.
    """
    a, b, keys = _network(size, seed, epoch)
    out = places.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = np.divmod(out[todo], b)
        for i in range(0, _ROUNDS, 2):
            left = (left + _mixed(right, keys[i]) % a) % a
            right = (right + _mixed(left, keys[i + 1]) % b) % b
        out[todo] = left * b + right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


@functools.lru_cache(maxsize=256)
def _network(size: int, seed: int, epoch: int) -> tuple[np.uint64, np.uint64, list[np.uint64]]:
    """a, b and the key of each round of `permute`."""
    b = math.isqrt(size - 1) + 1
    keys = [np.uint64(mixed_key(seed, epoch, i)) for i in range(_ROUNDS)]
    return np.uint64(-(-size // b)), np.uint64(b), keys


_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31))
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Pseudo-random uint64 numbers from values and a key: the finaliser of splitmix64 (Steele, Lea & Flood 2014)."""
    mixed = values + key
    mixed ^= mixed >> _SHIFTS[0]
    mixed *= _FACTORS[0]
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _FACTORS[1]
    mixed ^= mixed >> _SHIFTS[2]
    return mixed


@functools.lru_cache(maxsize=256)
def mixed_key(*values: int) -> int:
    """The same mixing of small numbers, one after another, into one of 64 bits."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state

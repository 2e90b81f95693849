"""Rows of a stream: text that is tokenised while it is trained on, its documents in order, cut into rows as they come.

A stream continues exactly from (cursor, tokens used) with any number of workers, any batch size and any row length.
"""

from collections.abc import Iterator

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.batches import DataState
from gptjax.data.chunks import Cursor, TokenChunk
from gptjax.data.packing import Batch, Spans, cut


class StreamRows:
    """Rows cut from a source's chunks in order: every target is predicted once in each pass over the source.

    `chunks` begins at the state's cursor. Packed rows lie end to end; padded ones hold a document, or a slice, each.
    """

    def __init__(self, chunks: Iterator[TokenChunk], state: DataState, cfg: DataConfig):
        self._chunks, self._cfg = chunks, cfg
        self._buffer: list[TokenChunk] = []
        self._tokens, self.starts = np.zeros(0, np.int32), np.zeros(0, np.int64)  # of the chunks in the buffer
        self._next: int = state["token"]  # the first token of the next row

    @property
    def state(self) -> DataState:
        """The beginning of the next row: {"epoch", "file", "document", "segment"} of a chunk, and a "token" of it."""
        return {**self._buffer[0].cursor._asdict(), "token": self._next}

    @property
    def corrupt(self) -> tuple[str, ...]:
        """The corrupt files of this pass, up to the last chunk that the rows so far needed."""
        return self._buffer[-1].corrupt

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the buffer."""
        return self._tokens[start:stop]

    def take(self, count: int) -> Batch:
        """The next `count` rows, as `packing.cut` describes them."""
        length = self._cfg.length
        if self._cfg.packing == "packed":
            self._fill(self._next + count * length + 1)
            start, width = self._next + np.arange(count) * length, np.full(count, length)
            self._next += count * length
        else:
            start, width = np.array([self._slice() for _ in range(count)], np.int64).reshape(count, 2).T
        spans = Spans(np.arange(count), np.zeros(count, np.int64), start, width)
        batch = cut(self, spans, count, length, self._cfg.cross_documents)
        while len(self._buffer) > 1 and self._next >= len(self._buffer[0].tokens):
            self._next -= len(self._buffer.pop(0).tokens)
        self._join()
        return batch

    def _slice(self) -> tuple[int, int]:
        """Start and length of the next slice of a document; the last token of a document predicts nothing."""
        while True:
            start, length = self._next, self._cfg.length
            self._fill(start + length + 2)
            later = np.searchsorted(self.starts, start, side="right")
            last = int(self.starts[later]) - 1 if later < len(self.starts) else start + length + 1
            width = min(length, last - start)
            self._next = last + 1 if start + width == last else start + width
            if width:
                return start, width

    def _fill(self, count: int) -> None:
        """Reads chunks until the buffer has so many tokens."""
        size = len(self._tokens)
        if size < count:
            while size < count:
                self._buffer.append(next(self._chunks))
                size += len(self._buffer[-1].tokens)
            self._join()

    def _join(self) -> None:
        before = np.cumsum([0, *(len(chunk.tokens) for chunk in self._buffer)])
        self._tokens = np.concatenate([chunk.tokens for chunk in self._buffer])
        self.starts = np.concatenate([chunk.starts + first for chunk, first in zip(self._buffer, before)])


def start_state() -> DataState:
    """The state of a stream before its first row."""
    return {**Cursor()._asdict(), "token": 0}


def cursor_of(state: DataState) -> Cursor:
    """The cursor of the chunk that a stream's state lies in."""
    return Cursor(*(state[name] for name in Cursor._fields))

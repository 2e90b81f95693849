"""Rows of a stream: text that is tokenised while it is trained on, its documents in order, cut into rows as they come.

A stream goes on exactly from (place, tokens used) with any number of workers, any batch size and any row length.
"""

from collections.abc import Generator, Iterator

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.batches import DataState
from gptjax.data.chunks import Cursor, StreamSpec, TokenChunk
from gptjax.data.packing import Batch, Spans, cut
from gptjax.data.workers import chunks_from_workers


class StreamRows:
    """Rows cut from a source's chunks in order: every target is predicted once in each pass over the source.

    `chunks` begins at the state's place. Packed rows lie end to end; padded ones hold a document, or a slice, each.
    """

    def __init__(self, chunks: Iterator[TokenChunk], state: DataState, cfg: DataConfig):
        self._chunks, self._cfg = chunks, cfg
        self._held: list[TokenChunk] = []
        self._tokens, self.starts = np.zeros(0, np.int32), np.zeros(0, np.int64)  # of the chunks that are held
        self._next: int = state["token"]  # where the next row begins among them

    @property
    def state(self) -> DataState:
        """Where the next row begins: {"epoch", "unit", "document", "piece"} of a chunk, and a "token" of it."""
        return {**self._held[0].place._asdict(), "token": self._next}

    @property
    def corrupt(self) -> tuple[str, ...]:
        """What was found corrupt in this pass, up to the last chunk that the rows so far needed."""
        return self._held[-1].corrupt

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of those that are held."""
        return self._tokens[start:stop]

    def take(self, count: int) -> Batch:
        """The next `count` rows, as `packing.cut` describes them."""
        length = self._cfg.length
        if self._cfg.packing == "packed":
            self._hold(self._next + count * length + 1)
            start, width = self._next + np.arange(count) * length, np.full(count, length)
            self._next += count * length
        else:
            start, width = np.array([self._slice() for _ in range(count)], np.int64).reshape(count, 2).T
        spans = Spans(np.arange(count), np.zeros(count, np.int64), start, width)
        batch = cut(self, spans, count, length, self._cfg.cross_documents)
        while len(self._held) > 1 and self._next >= len(self._held[0].tokens):
            self._next -= len(self._held.pop(0).tokens)
        self._join()
        return batch

    def _slice(self) -> tuple[int, int]:
        """Start and length of the next slice of a document; the last token of a document predicts nothing."""
        while True:
            start, length = self._next, self._cfg.length
            self._hold(start + length + 2)
            later = np.searchsorted(self.starts, start, side="right")
            last = int(self.starts[later]) - 1 if later < len(self.starts) else start + length + 1
            width = min(length, last - start)
            self._next = last + 1 if start + width == last else start + width
            if width:
                return start, width

    def _hold(self, count: int) -> None:
        """Reads chunks until so many tokens are held."""
        if len(self._tokens) < count:
            size = len(self._tokens)
            while size < count:
                self._held.append(next(self._chunks))
                size += len(self._held[-1].tokens)
            self._join()

    def _join(self) -> None:
        before = np.cumsum([0, *(len(chunk.tokens) for chunk in self._held)])
        self._tokens = np.concatenate([chunk.tokens for chunk in self._held])
        self.starts = np.concatenate([chunk.starts + at for chunk, at in zip(self._held, before)])


def start_state() -> DataState:
    """The state of a stream before its first row."""
    return {**Cursor()._asdict(), "token": 0}


def cursor_of(state: DataState) -> Cursor:
    """The chunk that a stream's state lies in."""
    return Cursor(*(state[name] for name in Cursor._fields))


def open_chunks(text: StreamSpec, place: Cursor, workers: int) -> Generator[TokenChunk, None, None]:
    """The chunks of a text from a place on, made by `workers` processes (0: in this one); close it at the end."""
    if not workers:
        return text.chunks(place)
    return chunks_from_workers(text, place, workers)

"""Text that is tokenised while it is trained on: a source's documents in their order, cut into rows as they come.

The source is read in chunks of about CHUNK_BYTES of text. A chunk is known by its place, where it begins, so any
process can make it from the text alone, and a stream goes on exactly from (place, tokens used) with any number of
workers, any batch size and any row length.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptjax.config import DataConfig, TokenizerConfig
from gptjax.config.section import InputError
from gptjax.data.batches import State
from gptjax.data.encode import Encoder, Piece, parts
from gptjax.data.formats import Damaged, Document
from gptjax.data.packing import Batch, Spans, cut
from gptjax.data.records import Source
from gptjax.data.sources import Corrupt, open_source, unit_hash
from gptjax.tokenizer import Tokenizer, make_tokenizer

CHUNK_BYTES = 1 << 16  # of text, at least; the last piece of a document that goes in may be as long again


class Place(NamedTuple):
    """Where a chunk begins: in this pass, this unit (file), this document of it and this piece of that, all from 0."""

    epoch: int = 0
    unit: int = 0
    document: int = 0
    piece: int = 0


class Chunk(NamedTuple):
    """Tokens of the training text from a place on: int32; documents begin at `starts` (int64) of them.

    `corrupt` is what was found corrupt and left out in this pass, since its beginning or since the stream was opened.
    """

    place: Place
    tokens: np.ndarray
    starts: np.ndarray
    corrupt: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """A source of text and how it is read; small, so that workers can be told."""

    source: str
    text_field: str
    held_out: float  # documents whose hash is at most this are validation
    max_corrupt: int
    tokenizer: TokenizerConfig

    def chunks(self, place: Place, first: int = 0, every: int = 1) -> Generator[Chunk, None, None]:
        """Yields chunks first, first + every, ... counted from a place on, without end: one worker's share.

        Getting to the place costs nothing for the files before it, and reading without tokenising up to the document.
        A worker reads (unpacks, hashes) all the text and tokenises its share. Raises InputError where the source is
        not there, or has no text to train on.
        """
        tokenizer = make_tokenizer(self.tokenizer, iter(()))
        encoder = Encoder(tokenizer)
        for number, unread in enumerate(_unread(self, place, tokenizer)):
            if number % every == first:
                yield Chunk(unread.place, *tokenised(unread.pieces, tokenizer, encoder), unread.corrupt)

    def documents(self) -> Iterator[Document]:
        """Yields the held-out documents, once."""
        for _, _, document in _documents(open_source(self.source, self.text_field), Corrupt(self.max_corrupt)):
            if unit_hash(document.digest) <= self.held_out:
                yield document


class _Unread(NamedTuple):
    """A chunk before it is tokenised."""

    place: Place
    pieces: list[Piece]
    corrupt: tuple[str, ...]


def _unread(text: Text, place: Place, tokenizer: Tokenizer) -> Iterator[_Unread]:
    source = open_source(text.source, text.text_field)
    while True:
        corrupt = Corrupt(text.max_corrupt)
        pieces, size, begun, any_text = [], 0, place, place[1:] != (0, 0, 0)
        for unit, number, document in _documents(source, corrupt, place.unit, place.document):
            if unit_hash(document.digest) <= text.held_out:
                continue
            skipped = place.piece if (unit, number) == (place.unit, place.document) else 0
            for i, piece in enumerate(pieces_of(document, tokenizer)):
                if i < skipped:
                    continue
                pieces.append(piece)
                size += piece.num_bytes
                if size >= CHUNK_BYTES:
                    yield _Unread(begun, pieces, tuple(corrupt.found))
                    after = (number + 1, 0) if piece.last else (number, i + 1)
                    pieces, size, begun, any_text = [], 0, Place(place.epoch, unit, *after), True
        if pieces:
            yield _Unread(begun, pieces, tuple(corrupt.found))
        elif not any_text:
            raise InputError(f"source {text.source!r} has no text to train on: all of its documents are held out")
        place = Place(place.epoch + 1)


def pieces_of(document: Document, tokenizer: Tokenizer) -> Iterator[Piece]:
    """A document's text in pieces, cut where that changes no ids."""
    for part in parts([("train", document)], tokenizer):
        yield from part


def tokenised(pieces: list[Piece], tokenizer: Tokenizer, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the pieces, [bos] + ids + [eos] for each document, as int32, and where documents begin, int64."""
    tokens, starts = [], []
    for piece, ids in zip(pieces, encoder.encode(pieces)):
        if piece.first:
            starts.append(len(tokens))
            tokens.append(tokenizer.bos_id)
        tokens += ids
        if piece.last:
            tokens.append(tokenizer.eos_id)
    return np.array(tokens, np.int32), np.array(starts, np.int64)


def _documents(
    source: Source, corrupt: Corrupt, unit: int = 0, document: int = 0
) -> Iterator[tuple[int, int, Document]]:
    """Yields (unit, its number in the unit, document) from a document on; corrupt units are counted and left.

    The documents before the damage were yielded by then, nothing of the unit comes after it.
    """
    for u in range(unit, len(source.units)):
        try:
            for number, found in enumerate(source.units[u].read()):
                if u > unit or number >= document:
                    if corrupt.allowed:
                        found.check()
                    yield u, number, found
        except Damaged as error:
            corrupt.add(error)


class StreamRows:
    """Rows cut from a source's chunks in order: every target is predicted once in each pass over the source.

    `chunks` begins at the state's place. Packed rows lie end to end; padded ones hold a document, or a slice, each.
    """

    def __init__(self, chunks: Iterator[Chunk], state: State, cfg: DataConfig):
        self._chunks, self._cfg = chunks, cfg
        self._held: list[Chunk] = []
        self._tokens, self.starts = np.zeros(0, np.int32), np.zeros(0, np.int64)  # of the chunks that are held
        self._next: int = state["token"]  # where the next row begins among them

    @property
    def state(self) -> State:
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


def start_state() -> State:
    """The state of a stream before its first row."""
    return {**Place()._asdict(), "token": 0}


def place_of(state: State) -> Place:
    """The chunk that a stream's state lies in."""
    return Place(*(state[name] for name in Place._fields))


def open_chunks(text: Text, place: Place, workers: int) -> Generator[Chunk, None, None]:
    """The chunks of a text from a place on, made by `workers` processes (0: in this one); close it at the end."""
    if not workers:
        return text.chunks(place)
    from gptjax.data.workers import made_by_workers

    return made_by_workers(text, place, workers)

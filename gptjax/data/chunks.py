"""A source's text read in chunks of about CHUNK_BYTES, for a stream that is tokenised while it is trained on.

A chunk is known by its place, where it begins, so any process can make it from the text alone.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptjax.config import TokenizerConfig
from gptjax.config.section import InputError
from gptjax.data.encode import Encoder, TextSegment, segments_of, tokenize_segments
from gptjax.data.formats import CorruptData, Document
from gptjax.data.records import Source
from gptjax.data.sources import ErrorBudget, open_source, unit_hash
from gptjax.tokenizer import Tokenizer, make_tokenizer

CHUNK_BYTES = 1 << 16  # of text, at least; the last piece of a document that goes in may be as long again


class Cursor(NamedTuple):
    """Where a chunk begins: in this pass, this unit (file), this document of it and this piece of that, all from 0."""

    epoch: int = 0
    unit: int = 0
    document: int = 0
    piece: int = 0


class TokenChunk(NamedTuple):
    """Tokens of the training text from a place on: int32; documents begin at `starts` (int64) of them.

    `corrupt` is what was found corrupt and left out in this pass, since its beginning or since the stream was opened.
    """

    place: Cursor
    tokens: np.ndarray
    starts: np.ndarray
    corrupt: tuple[str, ...] = ()


@dataclass(frozen=True)
class StreamSpec:
    """A source of text and how it is read; small, so that workers can be told."""

    source: str
    text_field: str
    held_out: float  # documents whose hash is at most this are validation
    max_corrupt: int
    tokenizer: TokenizerConfig

    def chunks(self, place: Cursor, first: int = 0, every: int = 1) -> Generator[TokenChunk, None, None]:
        """Yields chunks first, first + every, ... counted from a place on, without end: one worker's share.

        Getting to the place costs nothing for the files before it, and reading without tokenising up to the document.
        A worker reads (unpacks, hashes) all the text and tokenises its share. Raises InputError where the source is
        not there, or has no text to train on.
        """
        tokenizer = make_tokenizer(self.tokenizer, iter(()))
        encoder = Encoder(tokenizer)
        for number, unread in enumerate(_unread(self, place, tokenizer)):
            if number % every == first:
                yield TokenChunk(unread.place, *tokenize_segments(unread.pieces, tokenizer, encoder), unread.corrupt)

    def documents(self) -> Iterator[Document]:
        """Yields the held-out documents, once."""
        for _, _, document in _documents(open_source(self.source, self.text_field), ErrorBudget(self.max_corrupt)):
            if unit_hash(document.digest) <= self.held_out:
                yield document


class _Unread(NamedTuple):
    """A chunk before it is tokenised."""

    place: Cursor
    pieces: list[TextSegment]
    corrupt: tuple[str, ...]


def _unread(text: StreamSpec, place: Cursor, tokenizer: Tokenizer) -> Iterator[_Unread]:
    source = open_source(text.source, text.text_field)
    while True:
        corrupt = ErrorBudget(text.max_corrupt)
        pieces, size, begun, any_text = [], 0, place, place[1:] != (0, 0, 0)
        for unit, number, document in _documents(source, corrupt, place.unit, place.document):
            if unit_hash(document.digest) <= text.held_out:
                continue
            skipped = place.piece if (unit, number) == (place.unit, place.document) else 0
            for i, piece in enumerate(segments_of(document, tokenizer)):
                if i < skipped:
                    continue
                pieces.append(piece)
                size += piece.num_bytes
                if size >= CHUNK_BYTES:
                    yield _Unread(begun, pieces, tuple(corrupt.found))
                    after = (number + 1, 0) if piece.last else (number, i + 1)
                    pieces, size, begun, any_text = [], 0, Cursor(place.epoch, unit, *after), True
        if pieces:
            yield _Unread(begun, pieces, tuple(corrupt.found))
        elif not any_text:
            raise InputError(f"source {text.source!r} has no text to train on: all of its documents are held out")
        place = Cursor(place.epoch + 1)


def _documents(
    source: Source, corrupt: ErrorBudget, unit: int = 0, document: int = 0
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
        except CorruptData as error:
            corrupt.add(error)

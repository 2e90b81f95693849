"""A source's text in chunks of about CHUNK_BYTES, for a stream that is tokenised while it is trained on.

A chunk is identified by its cursor, so any process can make it from the text alone.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from gptjax.config import TokenizerConfig
from gptjax.config.plugins import is_registered
from gptjax.config.section import InputError
from gptjax.data.encode import Encoder, TextSegment, segments_of
from gptjax.data.formats import CorruptData, Document
from gptjax.data.holdout import unit_hash
from gptjax.data.records import Source
from gptjax.data.sources import ErrorBudget, is_function, open_source
from gptjax.data.worker import Worker
from gptjax.tokenizer import Tokenizer, make_tokenizer

CHUNK_BYTES = 1 << 16  # of text, at least; the last segment that goes in may be as long again


class Cursor(NamedTuple):
    """The beginning of a chunk: this segment of this document of this file in this pass, all from 0."""

    epoch: int = 0
    file: int = 0
    document: int = 0
    segment: int = 0


class TokenChunk(NamedTuple):
    """Tokens of the training text from a cursor on: int32; documents begin at `starts` (int64) of them.

    `corrupt` lists what was corrupt and left out in this pass, since its beginning or since the stream was opened.
    """

    cursor: Cursor
    tokens: np.ndarray
    starts: np.ndarray
    corrupt: tuple[str, ...] = ()


@dataclass(frozen=True)
class StreamSpec:
    """A source of text and the way it is read; small, so that it can be sent to workers."""

    source: str
    text_field: str
    fraction: float  # documents whose hash is at most this are held out, where the source has no validation split
    max_corrupt: int
    tokenizer: TokenizerConfig

    def chunks(self, cursor: Cursor, first: int = 0, every: int = 1) -> Generator[TokenChunk, None, None]:
        """Yields chunks first, first + every, ... counted from a cursor on, without end: one worker's share.

        Getting to the cursor costs nothing for the files before it, and reading without tokenising up to the document.
        A worker reads (unpacks, hashes) all the text and tokenises its share. Raises InputError where the source is
        not there, or has no text to train on.
        """
        tokenizer = make_tokenizer(self.tokenizer, iter(()))
        encoder = Encoder(tokenizer)
        for start, segments, corrupt in itertools.islice(self._text(cursor, tokenizer), first, None, every):
            yield TokenChunk(start, *encoder.tokenize(segments), corrupt)

    def documents(self, read: Counter[str]) -> Iterator[Document]:
        """Yields the held-out documents, once, and adds up the bytes "held out" and "read" up to each of them.

        A source with a validation split of its own holds that out and nothing else: of it no bytes are added up.
        """
        source = open_source(self.source, self.text_field)
        for file, _, document in _documents(source, ErrorBudget(self.max_corrupt)):
            held = self._is_held_out(source, file, document)
            if not source.has_validation:
                read["read"] += document.num_bytes
                read["held out"] += document.num_bytes if held else 0
            if held:
                yield document

    def _is_held_out(self, source: Source, file: int, document: Document) -> bool:
        if source.has_validation:
            return source.files[file].validation
        return unit_hash(document.digest) <= self.fraction

    def _text(
        self, cursor: Cursor, tokenizer: Tokenizer
    ) -> Iterator[tuple[Cursor, list[TextSegment], tuple[str, ...]]]:
        """Yields each chunk before it is tokenised: its cursor, its segments and what was corrupt up to its end."""
        source = open_source(self.source, self.text_field)
        while True:
            corrupt = ErrorBudget(self.max_corrupt)
            segments, size, start, any_text = [], 0, cursor, cursor[1:] != (0, 0, 0)
            for file, number, document in _documents(source, corrupt, cursor.file, cursor.document):
                if self._is_held_out(source, file, document):
                    continue
                skipped = cursor.segment if (file, number) == (cursor.file, cursor.document) else 0
                for i, segment in enumerate(segments_of(document, tokenizer)):
                    if i < skipped:
                        continue
                    segments.append(segment)
                    size += segment.num_bytes
                    if size >= CHUNK_BYTES:
                        yield start, segments, tuple(corrupt.errors)
                        after = (number + 1, 0) if segment.last else (number, i + 1)
                        segments, size, start, any_text = [], 0, Cursor(cursor.epoch, file, *after), True
            if segments:
                yield start, segments, tuple(corrupt.errors)
            elif not any_text:
                raise InputError(f"source {self.source!r} has no text to train on: all of its documents are held out")
            cursor = Cursor(cursor.epoch + 1)


def open_chunks(spec: StreamSpec, cursor: Cursor, workers: int) -> Generator[TokenChunk, None, None]:
    """The chunks of a text from a cursor on, in order, made by so many processes (0: by this one); close it at the end.

    Raises InputError where one of the processes was killed, and where they can't import a source of the user's script.
    """
    if not workers:
        yield from spec.chunks(cursor)
        return
    if is_function(spec.source) and (spec.source.startswith("__main__:") or is_registered(spec.source)):
        raise InputError(
            f"source {spec.source!r} exists in this process alone, and data.workers={workers} worker processes import "
            f"it: give the name of a function in a module of its own, or --data.workers 0"
        )
    with contextlib.ExitStack() as stack:
        shares = [(spec, cursor, i, workers) for i in range(workers)]
        processes = [stack.enter_context(Worker("--data.workers", _send_chunks, *share)) for share in shares]
        for process in itertools.cycle(processes):
            yield process.receive()


def _send_chunks(pipe: Connection, spec: StreamSpec, *share: object) -> None:
    try:
        for chunk in spec.chunks(*share):  # pyright: ignore[reportArgumentType]
            pipe.send(chunk)
    except InputError as error:
        pipe.send(error)


def _documents(
    source: Source, corrupt: ErrorBudget, file: int = 0, document: int = 0
) -> Iterator[tuple[int, int, Document]]:
    """Yields (file, its number in the file, document) from a document on; corrupt files are counted and left.

    The documents before the damage were yielded by then, nothing of the file comes after it.
    """
    for i in range(file, len(source.files)):
        try:
            for number, text in enumerate(source.files[i].read()):
                if i > file or number >= document:
                    if corrupt.allowed:
                        text.check()
                    yield i, number, text
        except CorruptData as error:
            corrupt.add(error)

"""Tokenises the kept text in parts, in worker processes, each part into a file of its own.

The text of a part depends on the text alone, so any number of workers writes the same files, and a preparation that
was killed continues with those that are missing.
"""

import contextlib
import io
import zipfile
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.section import InputError
from gptjax.data.formats import Document
from gptjax.data.holdout import SPLITS, SplitName
from gptjax.data.worker import Worker
from gptjax.storage import Disk
from gptjax.tokenizer import Tokenizer, last_safe_cut, load_tokenizer

PART_BYTES = 8 << 20  # text of a part
_BATCH_BYTES = 1 << 20  # text tokenised at a time
_WHOLE = 1 << 16  # bytes of a document that is not cut
_LONGEST = 1 << 20  # characters without a safe cut; then it is cut at a newline, a space or anywhere
_SHORT = 1 << 11  # characters; SentencePiece takes time n log n for a text of n


class TextSegment(NamedTuple):
    """A part of a document's text; `first` and `last` mark those that it begins and ends with."""

    split: SplitName
    first: bool
    last: bool
    text: str
    num_bytes: int


def text_parts(kept: Iterable[tuple[SplitName, Document]], tokenizer: Tokenizer) -> Iterator[list[TextSegment]]:
    """Yields the text in lists of about PART_BYTES; documents are cut where that changes no ids."""
    part, size = [], 0
    for split, document in kept:
        at = 0
        for text in _texts(document, tokenizer):
            num_bytes = len(text.encode())
            part.append(TextSegment(split, at == 0, at + num_bytes == document.num_bytes, text, num_bytes))
            at += num_bytes
            size += num_bytes + 64  # many tiny documents are no smaller in memory
            if size >= PART_BYTES:
                yield part
                part, size = [], 0
    if part:
        yield part


def segments_of(document: Document, tokenizer: Tokenizer) -> Iterator[TextSegment]:
    """A document's text in segments, cut where that changes no ids."""
    for part in text_parts([("train", document)], tokenizer):
        yield from part


def _texts(document: Document, tokenizer: Tokenizer) -> Iterator[str]:
    if document.num_bytes <= _WHOLE:
        yield document.text
        return
    rest, left = "", document.num_bytes
    for piece in document.pieces(_WHOLE):
        rest += piece
        left -= len(piece.encode())
        if left:
            cut = last_safe_cut(tokenizer, rest) or (len(rest) if len(rest) >= _LONGEST else 0)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    yield rest


class Encoder:
    """Tokenises segments: [bos] + ids + [eos] for each document."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def write(self, part: list[TextSegment], path: Path) -> None:
        """Tokenises the part into a file that is there whole, on the disk, or not at all."""
        dtype = token_dtype(self._tokenizer)
        arrays: dict[str, Any] = {}
        for name in SPLITS:
            segments = [segment for segment in part if segment.split == name]
            tokens, starts = self.tokenize(segments)
            arrays |= {f"{name}_tokens": tokens.astype(dtype), f"{name}_starts": starts}
            arrays[f"{name}_bytes"] = np.int64(part_bytes(segments))
        file = io.BytesIO()
        np.savez(file, **arrays)
        Disk().write(path, file.getvalue())

    def tokenize(self, segments: list[TextSegment]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the segments, int32, and where documents begin in them, int64."""
        tokens, starts, count = [np.zeros(0, np.int32)], [], 0
        for batch in _batches(segments):
            flat: list[int] = []
            for segment, ids in zip(batch, self._encode(batch)):
                if segment.first:
                    starts.append(count + len(flat))
                    flat.append(self._tokenizer.bos_id)
                flat += ids
                if segment.last:
                    flat.append(self._tokenizer.eos_id)
            tokens.append(np.array(flat, np.int32))
            assert tokens[-1].max(initial=0) < self._tokenizer.vocab_size, tokens[-1].max()
            count += len(flat)
        return np.concatenate(tokens), np.array(starts, np.int64)

    def _encode(self, segments: list[TextSegment]) -> Iterator[list[int]]:
        """Yields the ids of each segment."""
        texts, firsts, counts = [], [], []
        for segment in segments:
            short = self._short(segment.text)
            texts += short
            firsts += [segment.first] + [False] * (len(short) - 1)
            counts.append(len(short))
        encoded = iter(self._tokenizer.encode_batch(texts, firsts))
        for count in counts:
            ids = next(encoded)
            for _ in range(count - 1):
                ids += next(encoded)
            yield ids

    def _short(self, text: str) -> list[str]:
        """The text cut where that changes no ids: short texts are encoded faster."""
        texts, start = [], 0
        while len(text) - start > _SHORT:
            match = self._tokenizer.safe_cut.search(text, start + _SHORT)
            if match is None or match.start() == len(text):
                break
            texts.append(text[start : match.start()])
            start = match.start()
        return [*texts, text[start:]]


def read_part(path: Path) -> Iterator[tuple[SplitName, np.ndarray, np.ndarray, int]]:
    """Yields for each split its tokens in the part, the document starts in them, and the bytes of their text."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in SPLITS:
                yield name, arrays[f"{name}_tokens"], arrays[f"{name}_starts"], int(arrays[f"{name}_bytes"])
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        path.unlink()
        raise InputError(f"{path} was damaged and is deleted; run the same command again to make it anew") from None


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The narrowest of the two types that hold every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def encode_parts(
    jobs: Iterable[tuple[list[TextSegment], Path]], tokenizer_folder: Path, workers: int
) -> Generator[int, None, None]:
    """Tokenises each part into its file and yields its bytes of text when it is there, in the order they get ready.

    With one worker it is this process. Raises what `jobs` raises, and InputError where a worker was killed.
    """
    if workers == 1:
        encoder = None
        for part, path in jobs:
            encoder = encoder or Encoder(load_tokenizer(tokenizer_folder))
            encoder.write(part, path)
            yield part_bytes(part)
        return
    with contextlib.ExitStack() as stack:
        idle: list[Worker] = []
        busy: dict[Any, tuple[Worker, int]] = {}
        for part, path in jobs:
            if not idle and len(busy) < workers:
                idle.append(stack.enter_context(Worker("--workers", serve_encoder, tokenizer_folder)))
            elif not idle:
                yield from _finished(busy, idle)
            worker = idle.pop()
            worker.send((part, path))
            busy[worker.pipe] = worker, part_bytes(part)
        while busy:
            yield from _finished(busy, idle)


def part_bytes(part: list[TextSegment]) -> int:
    """Bytes of text in the part."""
    return sum(segment.num_bytes for segment in part)


def _finished(busy: dict[Any, tuple[Worker, int]], idle: list[Worker]) -> Iterator[int]:
    """Waits for one worker at least and yields the bytes of its part."""
    for pipe in wait(list(busy)):
        worker, num_bytes = busy.pop(pipe)
        worker.receive()
        yield num_bytes
        idle.append(worker)


def serve_encoder(pipe: Connection, tokenizer_folder: Path) -> None:
    """The work of a worker: tokenises the parts that come through the pipe until it is closed."""
    encoder = Encoder(load_tokenizer(tokenizer_folder))
    while True:
        part, path = pipe.recv()
        try:
            encoder.write(part, path)
        except (InputError, OSError) as error:
            pipe.send(error)
        else:
            pipe.send(None)


def _batches(part: list[TextSegment]) -> Iterator[list[TextSegment]]:
    start, size = 0, 0
    for stop, segment in enumerate(part, 1):
        size += segment.num_bytes + 64
        if size >= _BATCH_BYTES or stop == len(part):
            yield part[start:stop]
            start, size = stop, 0

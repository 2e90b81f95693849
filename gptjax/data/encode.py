"""Tokenises the kept text in parts, in worker processes, each part into a file of its own.

Which text a part holds depends on the text alone, so any number of workers writes the same files, and a preparation
that was killed goes on with those that are missing.
"""

import contextlib
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.section import InputError
from gptjax.data.formats import Document
from gptjax.data.sources import SPLITS, SplitName
from gptjax.tokenizer import Tokenizer, last_safe_cut, load_tokenizer

PART_BYTES = 8 << 20  # text of a part
_BATCH_BYTES = 1 << 20  # text tokenised at a time
_WHOLE = 1 << 16  # bytes of a document that is not cut
_LONGEST = 1 << 20  # characters without a safe cut; then it is cut at a newline, a space or anywhere
_SHORT = 1 << 11  # characters; SentencePiece takes time n log n for a text of n


class TextSegment(NamedTuple):
    """A piece of a document, and whether the document begins and ends with it."""

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
    """A document's text in pieces, cut where that changes no ids."""
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
    """Tokenises parts: [bos] + ids + [eos] for each document."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer)

    def write(self, part: list[TextSegment], path: Path) -> None:
        """Tokenises the part into a file that is there whole, on the disk, or not at all."""
        tokens: dict[SplitName, list[np.ndarray]] = {name: [np.empty(0, self._dtype)] for name in SPLITS}
        starts: dict[SplitName, list[int]] = {name: [] for name in SPLITS}
        num_bytes, count = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        for pieces in _batches(part):
            flat: dict[SplitName, list[int]] = {name: [] for name in SPLITS}
            for piece, ids in zip(pieces, self.encode(pieces)):
                out = flat[piece.split]
                if piece.first:
                    starts[piece.split].append(count[piece.split] + len(out))
                    out.append(self._tokenizer.bos_id)
                out += ids
                if piece.last:
                    out.append(self._tokenizer.eos_id)
                num_bytes[piece.split] += piece.num_bytes
            for name in SPLITS:
                ids = flat[name]
                assert not ids or max(ids) < self._tokenizer.vocab_size, (path, max(ids))
                tokens[name].append(np.array(ids, self._dtype))
                count[name] += len(ids)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            arrays: dict[str, Any] = {}
            for name in SPLITS:
                arrays |= {f"{name}_tokens": np.concatenate(tokens[name]), f"{name}_bytes": np.int64(num_bytes[name])}
                arrays[f"{name}_starts"] = np.array(starts[name], np.int64)
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def encode(self, pieces: list[TextSegment]) -> Iterator[list[int]]:
        """Yields the ids of each piece."""
        texts, firsts, counts = [], [], []
        for piece in pieces:
            short = self._short(piece.text)
            texts += short
            firsts += [piece.first] + [False] * (len(short) - 1)
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
            found = self._tokenizer.safe_cut.search(text, start + _SHORT)
            if found is None or found.start() == len(text):
                break
            texts.append(text[start : found.start()])
            start = found.start()
        return [*texts, text[start:]]


def read_part(path: Path) -> Iterator[tuple[SplitName, np.ndarray, np.ndarray, int]]:
    """Yields for each split its tokens in the part, where in them documents begin, and the bytes of their text."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in SPLITS:
                yield name, arrays[f"{name}_tokens"], arrays[f"{name}_starts"], int(arrays[f"{name}_bytes"])
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
        path.unlink()
        raise InputError(f"{path} was damaged and is deleted; run the same command again to make it anew") from None


def tokenize_segments(
    pieces: list[TextSegment], tokenizer: Tokenizer, encoder: Encoder
) -> tuple[np.ndarray, np.ndarray]:
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
        idle: list[_Worker] = []
        busy: dict[Any, _Worker] = {}
        for part, path in jobs:
            if not idle and len(busy) < workers:
                idle.append(stack.enter_context(_Worker(tokenizer_folder)))
            elif not idle:
                yield from _finished(busy, idle)
            worker = idle.pop()
            worker.give(part, path)
            busy[worker.pipe] = worker
        while busy:
            yield from _finished(busy, idle)


def part_bytes(part: list[TextSegment]) -> int:
    """Bytes of text in the part."""
    return sum(piece.num_bytes for piece in part)


def _finished(busy: dict[Any, "_Worker"], idle: list["_Worker"]) -> Iterator[int]:
    """Waits for one worker at least and yields the bytes of its part."""
    for pipe in wait(list(busy)):
        worker = busy.pop(pipe)
        yield worker.finish()
        idle.append(worker)


class _Worker:
    """A process that runs `main` below, and ends when this one does, however that ends.

    multiprocessing's own start methods would import the user's script again, which need not be made for that.
    """

    def __init__(self, tokenizer_folder: Path):
        self.pipe, theirs = Pipe()
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        # Libraries that encode with threads of their own: there is a process for each core already.
        env = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        program = "import sys; from gptjax.data.encode import main; main(int(sys.argv[1]), sys.argv[2])"
        command = [sys.executable, "-c", program, str(theirs.fileno()), str(tokenizer_folder)]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        self._num_bytes = 0

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pipe.close()
        if error[0] is not None:
            self.process.terminate()
        self.process.wait()

    def give(self, part: list[TextSegment], path: Path) -> None:
        self._num_bytes = part_bytes(part)
        try:
            self.pipe.send((part, path))
        except OSError:
            raise self._lost() from None

    def finish(self) -> int:
        try:
            error = self.pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if error is not None:
            raise error
        return self._num_bytes

    def _lost(self) -> InputError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return InputError(
            f"a worker process {how} (out of memory?); run the same command again to go on, with fewer --workers"
        )


def main(fd: int, tokenizer_folder: str) -> None:
    """The worker: tokenises the parts that come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent decides
    pipe = Connection(fd)
    with contextlib.suppress(EOFError, ConnectionError):
        encoder = Encoder(load_tokenizer(Path(tokenizer_folder)))
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
    for stop, piece in enumerate(part, 1):
        size += piece.num_bytes + 64
        if size >= _BATCH_BYTES or stop == len(part):
            yield part[start:stop]
            start, size = stop, 0

"""Texts and prepared corpora for tests: files of records, what was stored of them, and a reference for the hold-out."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptjax.config import PrepareConfig, TokenizerConfig
from gptjax.data.chunks import StreamSpec
from gptjax.data.corpus import Corpus
from gptjax.data.holdout import CUT, SPLITS, Holdout, choose_holdout, unit_hash
from gptjax.data.packing import batch_hash
from gptjax.data.prepare import Progress, prepare
from gptjax.data.sources import Document, documents

BYTES = TokenizerConfig(kind="bytes", vocab_size=258)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    """One record a text, packed with gzip where the name says so."""
    data = "".join(json.dumps({field: text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def damage(path: Path, at: int, flip: int = 0xFF) -> None:
    """Flips bits of the byte at this offset."""
    data = bytearray(path.read_bytes())
    data[at] ^= flip
    path.write_bytes(data)


def prepared(source: str | Path, out: Path, *, progress: Progress | None = None, **more) -> Corpus:
    """The corpus of a source, by one process and with the tokenizer of bytes unless it is said otherwise."""
    settings = {"source": str(source), "out": str(out), "tokenizer": BYTES, "workers": 1} | more
    return prepare(PrepareConfig(**settings), progress)


def texts_of(source: str | Path, text_field: str = "text", max_corrupt: int = 0) -> list[str]:
    """The texts as a stream reads them: all of them, held out."""
    spec = StreamSpec(str(source), text_field, 1.0, max_corrupt, TokenizerConfig())
    return [document.text for document in spec.documents(Counter())]


def stored(corpus: Corpus) -> dict[str, list[str]]:
    """The documents of each split, decoded, with their special tokens and counts checked."""
    texts = {}
    for name in ("train", "validation"):
        split, tokenizer = corpus.split(name), corpus.tokenizer
        rows = np.split(split.tokens(0, split.num_tokens), split.starts[1:])
        for row in rows:
            assert np.flatnonzero(row == tokenizer.bos_id).tolist() == [0]
            assert np.flatnonzero(row == tokenizer.eos_id).tolist() == [len(row) - 1]
        texts[name] = [tokenizer.decode(row) for row in rows]
        assert len(rows) == split.num_documents
        assert sum(len(text.encode()) for text in texts[name]) == split.num_bytes
    return texts


def hashes_and_sizes(texts: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    """What a hold-out is chosen by."""
    return np.array([unit_hash(t.digest) for t in texts]), np.array([t.num_bytes for t in texts])


def holdout(source: str | Path, fraction: float) -> Holdout:
    """The hold-out of a source, read plainly; raises InputError where it can't be split in two."""
    both = hashes_and_sizes(list(documents(str(source))))
    return choose_holdout(str(source), fraction, lambda: [both])


def splits(source: str | Path, fraction: float) -> dict[str, list[str]]:
    """The texts of each split, in the order of the source."""
    held, read = holdout(source, fraction), list(documents(str(source)))
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for document, status in zip(read, held.status(*hashes_and_sizes(read)).tolist()):
        parts = zip(SPLITS, document.split_tail(fraction)) if status == CUT else [(SPLITS[status], document)]
        for split, part in parts:
            texts[split].append(part.text)
    return texts


def take(pipeline, state, count: int) -> list[tuple[str, dict]]:
    """Hash and state of the next batches; states go through JSON, as those of a checkpoint do."""
    made = pipeline.batches(state)
    taken = [(batch_hash(batch), json.loads(json.dumps(after))) for batch, after in itertools.islice(made, count)]
    made.close()
    return taken


def take_counted(pipeline, count: int, source_of: Callable[[np.ndarray], str]) -> list[tuple[str, dict]]:
    """The first batches, as `take` has them; each is that of its rows, and its state counts each source's tokens."""
    taken, tokens = take(pipeline, pipeline.start, count), dict.fromkeys((v.name for v in pipeline.validation), 0)
    for step, (made, state) in enumerate(taken):
        batch = pipeline.batch(taken[step - 1][1]["rows"] if step else 0)
        assert batch_hash(batch) == made
        for row, weights in zip(batch["inputs_BL"], batch["weights_BL"]):
            tokens[source_of(row)] += int(weights.sum())
        assert state["tokens"] == tokens
    return taken


def run_python(program: str, *words, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Runs a program, or the file of one, in a process of its own, which must end with one of the codes."""
    command = [sys.executable, *([] if program.endswith(".py") else ["-c"]), program, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode in codes, done.stderr
    return done

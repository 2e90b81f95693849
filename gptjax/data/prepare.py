"""Turns text into a prepared corpus: tokenised ArrayRecord shards in TFDS's own folder format, and a manifest.

A record is a page of a split's token stream; `starts` in it are the places on the page at which documents begin.
`tfds.builder_from_directory(folder).as_data_source("train")` reads the folder, with no TensorFlow.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import TokenizerConfig, TrainTokenizerConfig
from gptjax.data.corpus import Corpus, is_corpus, open_corpus
from gptjax.data.manifest import DATASET, MANIFEST_FILE, Manifest, file_entry, write_manifest
from gptjax.data.shards import PAGE, SplitWriter, write_tfds_metadata
from gptjax.data.sources import SPLITS, Holdout, Split, file_sha256, holdout, source_sha256, split_documents
from gptjax.settings import InputError
from gptjax.tokenizer import META_FILE, MODEL_FILE, Tokenizer, load_model, make_tokenizer

TRAINING_BYTES = 64 << 20  # text that a tokenizer is trained on, spread evenly over a larger source
LOCK_FILE = ".prepare.lock"

_BATCH_BYTES = 1 << 20  # text tokenised at a time
_GOLDEN = 0.6180339887498949

Progress = Callable[[str, int, int], None]


def prepare(
    source: str,
    folder: str | Path,
    tokenizer_cfg: TokenizerConfig,
    validation_fraction: float,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenises the source into the folder and opens it; a finished folder made from the same inputs is used again.

    `progress(what, done, total)` is called now and then, in bytes of text. Neither training nor the tokenizer's
    training sees validation text. Raises InputError where the folder was made from other inputs, naming the
    difference, and for everything that is wrong with the source.
    """
    folder = Path(folder)
    inputs = {
        "source_sha256": source_sha256(source),
        "validation_fraction": validation_fraction,
        "tokenizer.kind": tokenizer_cfg.kind,
        "tokenizer.vocab_size": tokenizer_cfg.vocab_size,
        "tokenizer.path": _model_sha256(tokenizer_cfg.path),
    }
    if is_corpus(folder):
        return _reused(folder, inputs)
    with _writing(folder), _locked(folder):
        if is_corpus(folder):  # another process finished it while we waited
            return _reused(folder, inputs)
        _clear(folder)
        _write(source, folder, tokenizer_cfg, inputs, progress or (lambda what, done, total: None))
    return open_corpus(folder)


def report(corpus: Corpus) -> str:
    """What a corpus holds, in a line for each split."""
    manifest = corpus.manifest
    lines = [f"{corpus.folder}: {manifest.tokenizer_kind} tokenizer of {manifest.vocab_size:,} ids"]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name}: {split.tokens:,} tokens in {split.documents:,} document{'s' * (split.documents > 1)}, "
            f"{split.bytes:,} bytes of text, {split.bytes / split.tokens:.2f} bytes a token"
        )
    return "\n".join(lines)


def train_tokenizer(cfg: TrainTokenizerConfig) -> Tokenizer:
    """Trains a SentencePiece tokenizer on the training split of a source and writes it to cfg.out.

    It is the one that `prepare` would train. Raises InputError where the folder holds another one already.
    """
    settings = TokenizerConfig(kind="sentencepiece", vocab_size=cfg.vocab_size)
    held = holdout(cfg.source, cfg.validation_fraction)
    tokenizer = make_tokenizer(settings, _training_texts(cfg.source, held))
    path = Path(cfg.out) / MODEL_FILE
    if path.exists() and load_model(path).sha256 != tokenizer.sha256:
        raise InputError(f"{path} is another tokenizer; choose another folder with --out, or delete it")
    with _writing(Path(cfg.out)):
        tokenizer.save(Path(cfg.out))
    return tokenizer


def _write(source: str, folder: Path, cfg: TokenizerConfig, inputs: dict[str, Any], progress: Progress) -> None:
    held = holdout(source, inputs["validation_fraction"])
    progress("tokenizer", 0, held.num_bytes)
    tokenizer = make_tokenizer(cfg, _training_texts(source, held))
    tokenizer.save(folder)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = {name: SplitWriter(folder, name, tokenizer, dtype) for name in SPLITS}
    done = 0
    for batch in _batches(source, held):
        encoded = tokenizer.encode_batch([text for _, _, text in batch], [first for _, first, _ in batch])
        for (split, first, text), ids in zip(batch, encoded):
            size = len(text.encode())
            writers[split].add(ids, size, first)
            done += size
        progress("tokens", done, held.num_bytes)
    splits = {name: writer.finish() for name, writer in writers.items()}
    if source_sha256(source) != inputs["source_sha256"]:
        raise InputError(f"source {source!r} changed while it was being read; prepare it again")
    write_tfds_metadata(folder, splits, dtype)
    others = [META_FILE, "dataset_info.json", "features.json"] + [MODEL_FILE] * (cfg.kind == "sentencepiece")
    manifest = Manifest(
        source=source,
        inputs=inputs,
        tokenizer_kind=tokenizer.kind,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        page=PAGE,
        dtype=dtype.name,
        splits=splits,
        files=tuple(file_entry(folder / name) for name in others),
    )
    write_manifest(folder, manifest)


def _training_texts(source: str, held: Holdout) -> Iterator[str]:
    """Yields training text for the tokenizer, at most about TRAINING_BYTES, the same pieces each time."""
    share = TRAINING_BYTES / held.num_bytes
    number = 0
    for split, document in split_documents(source, held):
        if split == "train":
            for piece in document.pieces():
                # Multiples of the golden ratio fall evenly into [0, 1), so the pieces are spread over the source.
                if number * _GOLDEN % 1 < share:
                    yield piece
                number += 1


def _batches(source: str, held: Holdout) -> Iterator[list[tuple[Split, bool, str]]]:
    """Yields lists of (split, whether a document begins, text), each list about a mebibyte of text."""
    batch, size = [], 0
    for split, document in split_documents(source, held):
        first = True
        for piece in document.pieces() if document.num_bytes else [""]:
            batch.append((split, first, piece))
            first = False
            size += len(piece) + 64  # many tiny documents are no smaller in memory
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _reused(folder: Path, inputs: dict[str, Any]) -> Corpus:
    corpus = open_corpus(folder)
    for name, value in inputs.items():
        had = corpus.manifest.inputs.get(name)
        if had != value:
            raise InputError(
                f"{folder} was prepared with {name}={had!r}, got {value!r}; "
                "prepare into another folder, or delete this one"
            )
    return corpus


def _model_sha256(path: str) -> str:
    """Identity of the given tokenizer; empty where one is to be trained."""
    if not path:
        return ""
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"tokenizer.path={path!r} is no SentencePiece model; wanted a .model file or its folder")
    return file_sha256(file)


def _clear(folder: Path) -> None:
    """Removes what an unfinished run left: only names that `prepare` itself writes."""
    names = (META_FILE, MODEL_FILE, "dataset_info.json", "features.json", f"{MANIFEST_FILE}.partial")
    for path in (*(folder / name for name in names), *folder.glob(f"{DATASET}-*")):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes the folder; says in one line what the system refuses while it is written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        name = error.filename or folder
        raise InputError(f"{name} cannot be written ({error.strerror}); choose another folder") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process prepares this folder; the lock goes with its process, however that ends."""
    with (folder / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

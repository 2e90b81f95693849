"""Turns text into a prepared corpus: tokenised ArrayRecord shards in TFDS's own folder format, and a manifest.

A record is a page of a split's token stream; `starts` in it are the offsets on the page at which documents begin.
`tfds.builder_from_directory(folder).as_data_source("train")` reads the folder, with no TensorFlow.

Until it is finished, a folder has a folder WORK in it: the scan of the source, the tokenizer and the parts tokenised
so far. Killed at any moment, the same command goes on from these; the manifest is written last.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import PrepareConfig, TokenizerConfig, TrainTokenizerConfig
from gptjax.config.section import InputError
from gptjax.data import encode, shards
from gptjax.data.corpus import Corpus, is_corpus, open_corpus
from gptjax.data.holdout import SPLITS, SplitName, content_hash, share_notice
from gptjax.data.manifest import DATASET, Manifest, file_entry, write_manifest
from gptjax.data.records import Source
from gptjax.data.scan import Filters, ScanResult, changed, load_scan, scan, scan_for_training
from gptjax.data.sources import LOCK_FILE, open_source, source_sha256
from gptjax.data.tokens import check_settings, is_tokens, write_tokens
from gptjax.runtime.process import default_workers
from gptjax.runtime.status import status
from gptjax.runtime.versions import __version__
from gptjax.storage import Disk
from gptjax.tokenizer import (
    FILES,
    MODEL_FILE,
    Tokenizer,
    load_sentencepiece,
    load_tokenizer,
    make_tokenizer,
    train_sentencepiece,
)

TRAINING_BYTES = 64 << 20  # text that a tokenizer is trained on, spread evenly over a larger source
WORK = ".prepare"
ANOTHER_FOLDER = "prepare into another folder, or delete this one"

_GOLDEN = 0.6180339887498949
_METADATA = ("dataset_info.json", "features.json")

Progress = Callable[[str, int, int], None]


def prepare(cfg: PrepareConfig, progress: Progress | None = None, otherwise: str = ANOTHER_FOLDER) -> Corpus:
    """Tokenises the source into the folder cfg.out and opens it; a finished folder of the same inputs is used again.

    Ids of a source that is tokens are taken over. The files are the same for any cfg.workers. `progress(what, done,
    total)` is called now and then, in bytes of text (a total of 0 is not known yet). Neither training nor the
    tokenizer's training sees validation text. Raises InputError where the folder was made from other inputs, naming the
    difference and what to do `otherwise`, and for everything that is wrong with the source.
    """
    folder = Path(cfg.out)
    progress = progress or (lambda what, done, total: None)
    source = open_source(cfg.source, cfg.text_field)
    if is_tokens(cfg.source):
        check_settings(cfg)
    inputs = {
        "source_sha256": source_sha256(source) if source.paths else "",  # of its documents: known when they are read
        "text_field": cfg.text_field,
        "validation_fraction": 0.0 if source.has_validation else cfg.validation_fraction,  # of no effect
        "deduplicate": cfg.deduplicate,
        "min_bytes": cfg.min_bytes,
        "max_bytes": cfg.max_bytes,
        "tokenizer.kind": cfg.tokenizer.kind,
        "tokenizer.vocab_size": cfg.tokenizer.vocab_size,
        "tokenizer.path": make_tokenizer(cfg.tokenizer, iter(())).sha256 if cfg.tokenizer.path else "",
    }
    if is_corpus(folder):
        return _reused(cfg, source, inputs, otherwise)
    with _writing(folder), _locked(folder):
        if is_corpus(folder):  # another process finished it while we waited
            return _reused(cfg, source, inputs, otherwise)
        _write(cfg, source, inputs, progress)
    return open_corpus(folder)


def report(corpus: Corpus) -> str:
    """The contents of a corpus, in a line for each split, and the parts of its source that were left out."""
    manifest, left = corpus.manifest, corpus.manifest.report
    lines = [f"{corpus.folder}: {manifest.tokenizer_kind} tokenizer of {manifest.vocab_size:,} ids"]
    total = sum(split.bytes for split in manifest.splits.values())
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name}: {split.tokens:,} tokens in {split.documents:,} document{'s' * (split.documents > 1)}, "
            f"{split.bytes:,} bytes of text ({split.bytes / total:.2%}), {split.bytes / split.tokens:.2f} bytes a token"
        )
    counts = {"duplicates": left.duplicates, "too short": left.too_short, "too long": left.too_long}
    words = [f"{count:,} {name}" for name, count in counts.items() if count] or ["none"]
    words += [f"and {len(left.corrupt):,} corrupt file{'s' * (len(left.corrupt) > 1)}"] if left.corrupt else []
    lines.append(f"  left out of {left.documents:,} documents: {', '.join(words)}")
    return "\n".join([*lines, *(f"  {line}" for line in (*(f"corrupt: {e}" for e in left.corrupt), *notices(corpus)))])


def notices(corpus: Corpus) -> list[str]:
    """Lines about a source that its user should know: what is not read of it, and a held-out share that is far off."""
    manifest, fraction = corpus.manifest, corpus.manifest.inputs["validation_fraction"]
    sizes = {name: split.bytes for name, split in manifest.splits.items()}
    off = share_notice(sizes["validation"], sum(sizes.values()), fraction) if fraction else []
    return [*manifest.report.notes, *off]


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Gives a Progress that is a bar on stderr, where that is a terminal, and is wiped away at the end."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            close()
            settings = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
            bars[what] = tqdm(desc=what, total=total or None, file=sys.stderr, **settings)
        bars[what].update(done - bars[what].n)

    def close() -> None:
        for bar in bars.values():
            bar.close()

    try:
        yield show
    finally:
        close()


def train_tokenizer(cfg: TrainTokenizerConfig, say: Callable[[str], None] = lambda line: None) -> Tokenizer:
    """Trains a SentencePiece tokenizer on the training split of a source and writes it to cfg.out.

    It is the one that `prepare` would train. `say` hears of what is not read. Raises InputError where the folder
    holds another one already.
    """
    source = open_source(cfg.source, cfg.text_field)
    for note in source.notes:
        say(note)
    scan_result = scan_for_training(source, cfg.validation_fraction, cfg.max_corrupt)
    tokenizer = train_sentencepiece(training_texts(source, scan_result), cfg.vocab_size, "vocab_size")
    path = Path(cfg.out) / MODEL_FILE
    if path.exists() and load_sentencepiece(path).sha256 != tokenizer.sha256:
        raise InputError(f"{path} is another tokenizer; choose another folder with --out, or delete it")
    with _writing(Path(cfg.out)):
        tokenizer.save(Path(cfg.out))
    return tokenizer


def training_texts(source: Source, scan_result: ScanResult, total: int = 0) -> Iterator[str]:
    """Yields training text for the tokenizer, at most about TRAINING_BYTES, the same pieces each time.

    Where it is trained on several sources, `total` is the bytes that all of them keep.
    """
    share = TRAINING_BYTES / (total or scan_result.kept_bytes)
    number = 0
    for split, document in scan_result.documents(source):
        if split == "train":
            for piece in document.pieces():
                # Multiples of the golden ratio fall evenly into [0, 1), so the pieces are spread over the source.
                if number * _GOLDEN % 1 < share:
                    yield piece
                number += 1


def _write(cfg: PrepareConfig, source: Source, inputs: dict[str, Any], progress: Progress) -> None:
    folder, work = Path(cfg.out), Path(cfg.out) / WORK
    _begin(folder, inputs | {"max_corrupt": cfg.max_corrupt, "part_bytes": encode.PART_BYTES, "version": __version__})
    if is_tokens(cfg.source):
        tokenizer = _tokenizer(cfg.tokenizer, iter(()), work)
        writers = _writers(work, tokenizer)
        left = write_tokens(cfg.source, tokenizer, cfg.validation_fraction, writers, functools.partial(progress, "ids"))
        before, after = inputs["source_sha256"], source_sha256(source)
    else:
        scan_result = load_scan(work)
        if scan_result is None:
            filters = Filters(cfg.deduplicate, cfg.min_bytes, cfg.max_bytes, cfg.max_corrupt)
            scan_result = scan(source, cfg.validation_fraction, filters, work, progress)
            scan_result.save(work)
        progress("tokenizer", 0, scan_result.kept_bytes)
        tokenizer = _tokenizer(cfg.tokenizer, training_texts(source, scan_result), work)
        content = None if source.paths else content_hash()
        count = _write_parts(source, scan_result, tokenizer, content, work, cfg.workers or default_workers(), progress)
        before, after = inputs["source_sha256"], source_sha256(source) if source.paths else ""
        if content:
            before, after = scan_result.content_sha256, content.hexdigest()
        writers, left = _writers(work, tokenizer), scan_result.report
        _join_parts(work, count, writers)
    if before != after:
        shutil.rmtree(work)
        raise changed(source)
    splits = {name: writer.finish() for name, writer in writers.items()}
    shards.write_tfds_metadata(work / "out", splits, encode.token_dtype(tokenizer))
    tokenizer.save(work / "out")
    manifest = Manifest(
        source=cfg.source,
        inputs=inputs | {"source_sha256": before},
        tokenizer_kind=tokenizer.kind,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        page=shards.PAGE,
        dtype=encode.token_dtype(tokenizer).name,
        splits=splits,
        files=tuple(file_entry(work / "out" / name) for name in (*tokenizer.files, *_METADATA)),
        report=left,
    )
    for entry in manifest.all_files:
        os.replace(work / "out" / entry.name, folder / entry.name)
    write_manifest(folder, manifest)
    shutil.rmtree(work)


def _begin(folder: Path, inputs: dict[str, Any]) -> None:
    """Keeps the work of an unfinished run of the same inputs, and removes that of any other."""
    path = folder / WORK / "inputs.json"
    text = json.dumps(inputs, indent=1)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    unfinished = path.is_file()  # else the files are the user's: a tokenizer, or the texts themselves
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for file in (*(folder / name for name in (*FILES, *_METADATA)), *folder.glob(f"{DATASET}-*")):
        if unfinished:
            file.unlink(missing_ok=True)
        elif file.exists():
            raise InputError(f"{file} would be overwritten; delete it, or prepare into another folder with --out")
    path.parent.mkdir()
    Disk().write(path, text.encode())


def _tokenizer(cfg: TokenizerConfig, texts: Iterator[str], work: Path) -> Tokenizer:
    """The tokenizer of the settings, trained once: where a run was killed after that, it is loaded."""
    folder = work / "tokenizer"
    if not folder.is_dir():
        new = work / "tokenizer.partial"
        shutil.rmtree(new, ignore_errors=True)
        make_tokenizer(cfg, texts).save(new)
        os.replace(new, folder)
    return load_tokenizer(folder)


def _write_parts(
    source: Source,
    scan_result: ScanResult,
    tokenizer: Tokenizer,
    content: "hashlib._Hash | None",
    work: Path,
    workers: int,
    progress: Progress,
) -> int:
    """Tokenises every part that has no file yet, and returns the number of parts."""
    done = count = 0

    def missing() -> Iterator[tuple[list[encode.TextSegment], Path]]:
        nonlocal count, done
        for part in encode.text_parts(scan_result.documents(source, content), tokenizer):
            path = _part(work, count)
            count += 1
            if path.exists():
                done += encode.part_bytes(part)
                progress("tokens", done, scan_result.kept_bytes)
            else:
                yield part, path

    workers = min(workers, -(-scan_result.kept_bytes // encode.PART_BYTES))
    with contextlib.closing(encode.encode_parts(missing(), work / "tokenizer", workers)) as ready:
        for num_bytes in ready:
            done += num_bytes
            progress("tokens", done, scan_result.kept_bytes)
    return count


def _writers(work: Path, tokenizer: Tokenizer) -> dict[SplitName, shards.SplitWriter]:
    """Writers of the files of the corpus, into an empty folder."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return {name: shards.SplitWriter(out, name, encode.token_dtype(tokenizer)) for name in SPLITS}


def _join_parts(work: Path, count: int, writers: dict[SplitName, shards.SplitWriter]) -> None:
    for number in range(count):
        for name, tokens, starts, num_bytes in encode.read_part(_part(work, number)):
            writers[name].add(tokens, starts, num_bytes)


def _part(work: Path, number: int) -> Path:
    return work / f"part-{number:06d}.npz"


def _reused(cfg: PrepareConfig, source: Source, inputs: dict[str, Any], otherwise: str) -> Corpus:
    folder = Path(cfg.out)
    corpus = open_corpus(folder)
    had = corpus.manifest.inputs
    if not source.paths:
        inputs = inputs | {"source_sha256": source_sha256(source)}
    if had.get("source_sha256") != inputs["source_sha256"]:
        raise InputError(
            f"{folder} was prepared from {corpus.manifest.source!r}, and the text of {cfg.source!r} is another one; "
            f"restore that text, or {otherwise}"
        )
    for name, value in inputs.items():
        if had.get(name) != value:
            raise InputError(f"{folder} was prepared with {name}={had.get(name)!r}, got {value!r}; {otherwise}")
    if len(corpus.manifest.report.corrupt) > cfg.max_corrupt:
        raise InputError(
            f"{folder} was prepared without {len(corpus.manifest.report.corrupt)} corrupt files, max_corrupt="
            f"{cfg.max_corrupt}: {' | '.join(corpus.manifest.report.corrupt)}"
        )
    if (folder / WORK).exists():  # killed after the manifest was written
        with _writing(folder), _locked(folder):
            shutil.rmtree(folder / WORK, ignore_errors=True)
    return corpus


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes the folder; raises InputError for whatever the system refuses while it is written to."""
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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with status(f"waiting for another process, which prepares {folder}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield

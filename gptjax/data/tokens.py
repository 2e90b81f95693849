"""Files of token ids that other programs wrote: nanoGPT's .bin, and Megatron's .bin with its .idx.

nanoGPT's is uint16, little endian, and nothing else: train.bin, and val.bin beside it. Its meta.pkl is never read,
since a pickle runs code: the ids are those of the tokenizer that is given. Megatron's .idx (IndexedDataset in
megatron/core/datasets/indexed_dataset.py) is the magic, version, code of the ids' type, and the numbers of sequences
and of entries in the table of documents; then the sequences' sizes (int32) and byte offsets (int64), and the first
sequence of each document, with the number of sequences at the end (int64).
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptjax.config import PrepareConfig
from gptjax.config.section import InputError
from gptjax.data.formats import Document, open_file
from gptjax.data.holdout import CUT, TRAIN, VALIDATION, SplitName, choose_holdout, unit_hash
from gptjax.data.manifest import Report
from gptjax.data.records import Source, SourceFile
from gptjax.data.shards import SplitWriter
from gptjax.tokenizer import Tokenizer

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # those of Megatron's codes that are integers
_TOKENS = 1 << 22  # ids looked at, or copied, at a time
_SHOWN = 24  # ids whose text is shown


@dataclass(frozen=True)
class TokenFile:
    """The ids of a file, mapped; documents begin at `starts`, with their end at the end, where the file knows them."""

    path: Path
    ids: np.ndarray
    starts: np.ndarray | None = None

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields ids [start, stop), some at a time, each with its place in the file."""
        for at in range(start, len(self.ids) if stop is None else stop, _TOKENS):
            yield at, self.ids[at : min(at + _TOKENS, len(self.ids) if stop is None else stop)]

    def documents(self, tokenizer: Tokenizer) -> np.ndarray:
        """The places where documents begin, and the end of the last one: int64, rising. Each ends behind an end id.

        Raises InputError for an id that the tokenizer does not have.
        """
        ends = []
        for at, ids in self.chunks():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= tokenizer.vocab_size:
                wrong = low if low < 0 else high
                raise InputError(
                    f"{self.path}: id {wrong} at place {at + int(np.argmax(ids == wrong))}, but the {tokenizer.kind} "
                    f"tokenizer has ids 0 to {tokenizer.vocab_size - 1}; give the tokenizer that made the file: "
                    "--tokenizer.kind, --tokenizer.path and --tokenizer.vocab-size"
                )
            if self.starts is None:
                ends.append(at + 1 + np.flatnonzero(ids == tokenizer.eos_id))
        return np.unique(np.concatenate([[0], *ends, [len(self.ids)]])) if self.starts is None else self.starts


def is_tokens(source: str) -> bool:
    """True for the name of a file of token ids."""
    return Path(source).suffix.lower() in (".bin", ".idx") and Path(source).is_file()


def open_tokens(source: str) -> Source:
    """The source of a .bin or .idx file; of nanoGPT's train.bin, val.bin beside it is the validation split.

    Raises InputError where sizes, counts and offsets do not fit together; the ids are looked at when they are written.
    """
    files, paths, notes = [], [], ["the ids are taken over as they are: none is left out as a duplicate"]
    for path, held in _parts(source):
        open_token_file(path)
        files.append(SourceFile(str(path), lambda: _no_text(source), held))
        both = (path.with_suffix(".idx"), path)
        paths += [(part.suffix + " held out" * held, part) for part in both if part.is_file()]
        notes += [f"held out is {path.name}"] if held else []
    if Path(source).with_name("meta.pkl").is_file():
        notes.append("meta.pkl is not read, since a pickle can run code: the ids are those of the given tokenizer")
    return Source(source, tuple(files), tuple(paths), tuple(notes))


def _parts(source: str) -> list[tuple[Path, bool]]:
    """The .bin files of a source, each with True where it is held out; that one is first."""
    path = Path(source).with_suffix(".bin") if source.lower().endswith(".idx") else Path(source)
    held = path.with_name("val.bin")
    return [(held, True)] * (path.name == "train.bin" and held.is_file()) + [(path, False)]


def _no_text(source: str) -> Iterator[Document]:
    raise InputError(
        f"source {source!r} holds token ids and no text; run `gptjax prepare --source {source} --out FOLDER`, and "
        "train on that folder with --data.loading prepared"
    )


def open_token_file(path: Path) -> TokenFile:
    """The ids of a .bin file, and where documents begin if there is an .idx beside it."""
    index = path.with_suffix(".idx")
    kind, starts, expected = "<u2", None, None
    if index.is_file():
        kind, starts = _read_index(index)
        expected = int(starts[-1]) * np.dtype(kind).itemsize
    with open_file(path) as file:
        size = file.seek(0, 2)
    if not size:
        raise InputError(f"{path} is empty; wanted token ids")
    if expected is not None and size != expected:
        raise InputError(f"{path} has {size} bytes, but its .idx describes {expected}; one of them is damaged")
    if size % np.dtype(kind).itemsize:
        raise InputError(
            f"{path} has {size} bytes, which is no whole number of ids of 16 bits; it is damaged, or not nanoGPT's"
        )
    return TokenFile(path, np.memmap(path, kind, mode="r").view(np.ndarray), starts)


def _read_index(path: Path) -> tuple[str, np.ndarray]:
    """The type of the ids, and where documents begin, with the number of ids at the end: int64."""
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise InputError(f"{path} is no index of Megatron's: it does not begin with MMIDIDX; remove or restore it")
        _, version, code, sequences, entries = _HEADER.unpack(head)
        if version != _VERSION or code not in _TYPES:
            wanted = f"version {_VERSION} and a code of integers, {sorted(_TYPES)}"
            raise InputError(f"{path} has version {version} and type code {code}; wanted {wanted}")
        if _HEADER.size + 12 * sequences + 8 * entries > size:
            raise InputError(
                f"{path} has {size} bytes, too few for its {sequences} sequences and {entries} document entries; "
                "it is damaged"
            )
        sizes = np.frombuffer(file.read(4 * sequences), "<i4").astype(np.int64)
        offsets = np.frombuffer(file.read(8 * sequences), "<i8")
        documents = np.frombuffer(file.read(8 * entries), "<i8")
    ends = np.concatenate([[0], np.cumsum(sizes)])
    in_order = entries and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()
    one_by_one = (sizes >= 0).all() and (offsets == ends[:-1] * np.dtype(_TYPES[code]).itemsize).all()
    if not (in_order and one_by_one):
        raise InputError(f"{path}: its sequences or documents do not follow one another; it is damaged")
    return _TYPES[code], ends[documents]


def check_settings(cfg: PrepareConfig) -> None:
    """Raises InputError for settings of a preparation that ids can't have."""
    if cfg.min_bytes > 1 or cfg.max_bytes:
        raise InputError(f"min_bytes and max_bytes are of text, and source {cfg.source!r} is ids; leave them out")
    if cfg.tokenizer.kind == "sentencepiece" and not cfg.tokenizer.path:
        raise InputError(
            f"tokenizer.path is empty, and source {cfg.source!r} is ids, of which no tokenizer can be trained; give "
            "the one that made them: --tokenizer.kind, --tokenizer.path and --tokenizer.vocab-size"
        )


def write_tokens(
    source: str,
    tokenizer: Tokenizer,
    fraction: float,
    writers: Mapping[SplitName, SplitWriter],
    progress: Callable[[int, int], None],
) -> Report:
    """Copies the ids of a source into the writers of its splits and returns what there was.

    Without a held-out file, documents are held out as those of a text are, by their ids, and long ones are cut at an
    id. `progress(done, total)` is in ids. Raises InputError for an id that the tokenizer does not have.
    """
    parts = [(open_token_file(path), held) for path, held in _parts(source)]
    total, done, empty, pieces = sum(len(file.ids) for file, _ in parts), 0, 0, []
    for file, held in parts:
        starts = file.documents(tokenizer)
        sizes = np.diff(starts)
        begin, sizes = starts[:-1][sizes > 0], sizes[sizes > 0]
        empty += len(starts) - 1 - len(begin)
        if len(parts) == 1:
            hashes = [hashlib.sha256(file.ids[a : a + n].tobytes()).digest() for a, n in zip(begin, sizes)]
            hashes = np.array([unit_hash(digest) for digest in hashes])
            holdout = choose_holdout(source, fraction, lambda both=(hashes, sizes): [both])
            status = holdout.status(hashes, sizes)
        else:
            status = np.full(len(begin), VALIDATION if held else TRAIN)
        tail = np.where(status == CUT, np.maximum(1, np.rint(fraction * sizes).astype(np.int64)), 0)
        end = begin + sizes
        pieces += [("train", file, begin, end - tail, status != VALIDATION)]
        pieces += [("validation", file, np.where(status == CUT, end - tail, begin), end, status != TRAIN)]
    count = sum(len(begin) for name, _, begin, _, _ in pieces if name == "train")
    bytes_of = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    for name, file, begin, end, own in pieces:
        for start, stop, starts in _runs(begin[own], end[own]):
            for at, ids in file.chunks(start, stop):
                here = slice(*np.searchsorted(starts, [at, at + len(ids)]))
                writers[name].add(ids, starts[here] - at, int(bytes_of[ids].sum()))
                done += len(ids)
                progress(done, total)
    shown = tokenizer.decode(parts[-1][0].ids[:_SHOWN].tolist())
    notes = (*open_tokens(source).notes, f"the first ids mean {shown!r}")
    return Report(count + empty, 0, empty, 0, (), notes)


def _runs(begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (start, stop, document starts) of pieces that lie one behind the other."""
    groups = np.split(np.arange(len(begin)), np.flatnonzero(begin[1:] != end[:-1]) + 1)
    for group in groups if len(begin) else []:
        yield int(begin[group[0]]), int(end[group[-1]]), begin[group]

"""Documents from any source in a fixed order, and the source's identity.

Files are read by formats.py, datasets and functions by records.py; nothing is skipped silently.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.plugins import is_name
from gptjax.config.section import InputError
from gptjax.data.formats import SUFFIXES, CorruptData, Document, kind_of, open_file, read_file
from gptjax.data.holdout import content_hash
from gptjax.data.picture_sets import PICTURE_SETS, picture_set
from gptjax.data.records import HF, TFDS, Source, SourceFile, is_saved, open_function, open_hf, open_tfds
from gptjax.data.tokens import is_tokens, open_tokens
from gptjax.storage import file_sha256

BUILTIN = "builtin:"
CORPORA = Path(__file__).parent / "corpora"
LOCK_FILE = ".prepare.lock"  # in every folder that `prepare` writes, from its beginning on

_KINDS = 8  # of files that are not read, that are named
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".json", ".arrow")  # of these only the known kinds are read


def open_source(source: str | Source, text_field: str = "text") -> Source:
    """Finds the source's files; raises InputError where it is not there or of a kind that is not known.

    A file, a folder of files (.txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, also mixed), a folder by
    save_to_disk, builtin:NAME, tfds:..., hf:..., MODULE:FUNCTION, or a file of token ids (.bin), which has no text.
    """
    if isinstance(source, Source):
        return source
    if source.startswith(TFDS):
        return open_tfds(source, text_field)
    if source.startswith(HF):
        return open_hf(source, text_field)
    if is_saved_source(source):
        return open_hf(HF + source, text_field)
    if is_function(source):
        return open_function(source, text_field)
    if is_tokens(source):
        return open_tokens(source)
    paths, notes = source_paths(source)
    files = tuple(SourceFile(str(path), lambda path=path: read_file(path, text_field)) for path in paths)
    return Source(source, files, tuple((kind_of(path), path) for path in paths), notes)


def is_here(source: str) -> bool:
    """False for a source of files or folders that are not there; nothing is opened, and no name is looked up."""
    path = Path(source.removeprefix(HF).removeprefix(TFDS)).expanduser()
    if source.startswith((HF, TFDS)):
        head, _, split = str(path).rpartition(":")
        return not str(path).startswith(("/", ".")) or path.exists() or (split.isidentifier() and Path(head).exists())
    return source.startswith(BUILTIN) or is_name(source) or path.exists()


def is_function(source: str) -> bool:
    """True for the name of a function, whose module is imported to read the source."""
    return is_name(source) and not (
        source.startswith((BUILTIN, TFDS, HF)) or Path(source).exists() or is_saved_source(source)
    )


def is_saved_source(source: str) -> bool:
    """True for a folder that save_to_disk wrote, also as FOLDER:SPLIT."""
    head, colon, _ = source.rpartition(":")
    return is_saved(Path(source)) or bool(colon and is_saved(Path(head)))


def source_paths(source: str) -> tuple[list[Path], tuple[str, ...]]:
    """Paths of a source of files in the order they are read, and a line about the files of a folder that are not.

    Nothing is looked at below a prepared folder, nor in a hidden folder. Raises InputError where there are none, or
    where a file is of a kind that is not known.
    """
    if source.startswith(BUILTIN):
        paths = {f"{BUILTIN}{p.stem}": p for p in sorted(CORPORA.glob("*")) if p.suffix in (".txt", ".jsonl")}
        name = source.removeprefix(BUILTIN)
        if source not in paths and name not in PICTURE_SETS:
            made = (BUILTIN + one for one in PICTURE_SETS)
            raise InputError(f"source {source!r}: wanted one of {', '.join([*paths, *made])}")
        return [paths[source] if source in paths else picture_set(name)], ()
    path = Path(source)
    if path.is_dir():
        prepared = {p.parent for p in path.rglob(LOCK_FILE)} - {path}  # a tokenizer there may have a merges.txt
        files = [p for p in path.rglob("*") if p.is_file() and prepared.isdisjoint(p.parents)]
        hidden = [p for p in files if any(part.startswith(".") for part in p.relative_to(path).parts)]
        seen = sorted(set(files) - set(hidden), key=lambda p: p.relative_to(path).as_posix())
        texts = [p for p in seen if p.name.lower().endswith(SUFFIXES)]
        others = Counter(p.suffix.lower() or "without suffix" for p in set(seen) - set(texts))
        # A ._NAME.txt is no text but what macOS knows about NAME.txt.
        others["hidden"] = sum(p.name.lower().endswith(SUFFIXES) for p in hidden)
        note = _not_read(others)
        if not texts:
            none = f"source {source!r} has no text in it; wanted files {', '.join(SUFFIXES)}"
            ids = [f"its ids are source {path / 'train.bin'}"] if (path / "train.bin").is_file() else []
            raise InputError("; ".join([none, *note, *ids]))
        return texts, note
    if not path.exists():
        raise InputError(
            f"source {source!r} does not exist; wanted a file, a folder, builtin:shakespeare, tfds:NAME, hf:NAME or "
            "MODULE:FUNCTION"
        )
    if path.suffix.lower() in _PACKED and kind_of(path) == "text":
        raise InputError(f"source {source!r}: this kind is not read; wanted {', '.join(SUFFIXES)} or a folder")
    return [path], ()


def _not_read(kinds: Counter[str]) -> tuple[str, ...]:
    """A line that counts files by kind, the most frequent first; none where there are no files."""
    counts = sorted(((count, kind) for kind, count in kinds.items() if count), key=lambda pair: (-pair[0], pair[1]))
    shown = ", ".join([f"{kind} {count}" for count, kind in counts[:_KINDS]] + ["..."] * (len(counts) > _KINDS))
    total = sum(kinds.values())
    return (f"{total:,} file{'s' * (total > 1)} of other kinds not read: {shown}",) if total else ()


class ErrorBudget:
    """The corrupt files of a source that are left out, and the number allowed; `errors` has a line for each."""

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.errors: list[str] = []

    def add(self, error: CorruptData) -> None:
        """Counts one; raises InputError naming all of them where this is one more than allowed."""
        self.errors.append(str(error))
        if not self.allowed:
            raise error
        if len(self.errors) > self.allowed:
            raise InputError(f"{len(self.errors)} corrupt files, max_corrupt={self.allowed}: {' | '.join(self.errors)}")


def documents(source: str | Source, text_field: str = "text") -> Iterator[Document]:
    """Yields every document of the source in a fixed order: one a text file, one a record of the other kinds.

    Raises InputError, naming file and line, row or byte, for a record without the text, and for a corrupt file.
    """
    for file in open_source(source, text_field).files:
        yield from file.read()


def source_sha256(source: str | Source, text_field: str = "text") -> str:
    """Identity of a source's content: its files' kinds and bytes in order, wherever they lie, or its documents."""
    source = open_source(source, text_field)
    if not source.paths:
        total = content_hash()
        for document in documents(source):
            total.update(document.digest)
        return total.hexdigest()
    total = hashlib.sha256()
    for kind, path in source.paths:
        open_file(path).close()
        total.update(f"{kind} {file_sha256(path)}\n".encode())
    return total.hexdigest()

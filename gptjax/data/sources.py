"""Documents from any source in a fixed order, and the source's identity.

Files are read by formats.py, datasets and functions by records.py; nothing is skipped silently.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from gptjax.config.plugins import is_name
from gptjax.config.section import InputError
from gptjax.data.formats import SUFFIXES, CorruptData, Document, kind_of, open_file, read_file
from gptjax.data.holdout import content_hash
from gptjax.data.records import HF, TFDS, Source, SourceFile, open_function, open_hf, open_tfds
from gptjax.storage import file_sha256

BUILTIN = "builtin:"
CORPORA = Path(__file__).parent / "corpora"
LOCK_FILE = ".prepare.lock"  # in every folder that `prepare` writes, from its beginning on

_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".json", ".arrow")  # of these only the known kinds are read


def open_source(source: str | Source, text_field: str = "text") -> Source:
    """Finds the source's files; raises InputError where it is not there or of a kind that is not known.

    A file, a folder of files (.txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, also mixed), builtin:NAME, tfds:...,
    hf:..., or MODULE:FUNCTION.
    """
    if isinstance(source, Source):
        return source
    if source.startswith(TFDS):
        return open_tfds(source, text_field)
    if source.startswith(HF):
        return open_hf(source, text_field)
    if is_function(source):
        return open_function(source, text_field)
    paths = source_paths(source)
    files = tuple(SourceFile(str(path), lambda path=path: read_file(path, text_field)) for path in paths)
    return Source(source, files, tuple((kind_of(path), path) for path in paths))


def is_function(source: str) -> bool:
    """True for the name of a function, whose module is imported to read the source."""
    return not source.startswith((BUILTIN, TFDS, HF)) and is_name(source) and not Path(source).exists()


def source_paths(source: str) -> list[Path]:
    """Paths of a source of files in the order they are read, without those of prepared folders inside it.

    Raises InputError where there are none, or where a file is of a kind that is not known.
    """
    if source.startswith(BUILTIN):
        names = sorted(path.stem for path in CORPORA.glob("*.txt"))
        if source.removeprefix(BUILTIN) not in names:
            raise InputError(f"source {source!r}: wanted one of {', '.join(BUILTIN + name for name in names)}")
        return [CORPORA / f"{source.removeprefix(BUILTIN)}.txt"]
    path = Path(source)
    if path.is_dir():
        prepared = {p.parent for p in path.rglob(LOCK_FILE)} - {path}  # a tokenizer there may have a merges.txt
        files = [p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file()]
        files = [p for p in files if prepared.isdisjoint(p.parents)]
        if not files:
            raise InputError(f"source {source!r} has no text in it; wanted files {', '.join(SUFFIXES)}")
        return sorted(files, key=lambda p: p.relative_to(path).as_posix())
    if not path.exists():
        raise InputError(
            f"source {source!r} does not exist; wanted a file, a folder, builtin:shakespeare, tfds:NAME, hf:NAME or "
            "MODULE:FUNCTION"
        )
    if path.suffix.lower() in _PACKED and kind_of(path) == "text":
        raise InputError(f"source {source!r}: this kind is not read; wanted {', '.join(SUFFIXES)} or a folder")
    return [path]


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

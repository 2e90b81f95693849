"""The manifest of a prepared corpus: written last, it names every file with its size and SHA-256."""

import dataclasses
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import TokenizerConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.storage import file_sha256, write_json

MANIFEST_FILE = "manifest.json"  # its presence makes a folder a prepared corpus
SCHEMA = 1
DATASET = "corpus"


@dataclass(frozen=True)
class FileEntry:
    """A file of the corpus; `pages` is the number of records of a shard, and 0 for other files."""

    name: str
    size: int
    sha256: str
    pages: int = 0


@dataclass(frozen=True)
class SplitEntry:
    """A split's documents, tokens (special ones included), bytes of text, shards, and its table of document starts."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[FileEntry, ...]
    starts: FileEntry


@dataclass(frozen=True)
class Report:
    """Documents of the source, those of them left out, its corrupt files, each as a line that says why, and notes.

    A note is a line that says which splits are read, or that files are not.
    """

    documents: int
    duplicates: int
    too_short: int
    too_long: int
    corrupt: tuple[str, ...]
    notes: tuple[str, ...]

    @staticmethod
    def of(values: dict[str, Any]) -> "Report":
        """The report that JSON holds; raises TypeError or ValueError where it holds something else."""
        report = Report(**{**values, "corrupt": tuple(values["corrupt"]), "notes": tuple(values["notes"])})
        if not all(isinstance(line, str) for line in (*report.corrupt, *report.notes)):
            raise ValueError(report)
        return report


@dataclass(frozen=True)
class Manifest:
    """Contents of a corpus; `inputs` is what it was made from, and decides whether it may be used again."""

    source: str
    inputs: dict[str, Any]
    tokenizer_kind: str
    tokenizer_sha256: str
    vocab_size: int
    page: int
    dtype: str
    splits: dict[str, SplitEntry]
    files: tuple[FileEntry, ...]
    report: Report

    @property
    def all_files(self) -> list[FileEntry]:
        return [*self.files, *(f for split in self.splits.values() for f in (*split.shards, split.starts))]


def file_entry(path: Path, pages: int = 0) -> FileEntry:
    """Describes a finished file, after the disk has it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path), pages=pages)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json whole, or not at all."""
    write_json(folder / MANIFEST_FILE, {"schema": SCHEMA, **dataclasses.asdict(manifest)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared corpus; raises InputError where there is none, or it can't be understood."""
    path = folder / MANIFEST_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}), so this is no finished corpus; run `gptjax prepare` into it"
        ) from None
    except ValueError:
        raise InputError(f"{path} is not JSON, so it is damaged; delete the folder and run `gptjax prepare`") from None
    try:
        schema = value.pop("schema")
        if schema != SCHEMA:
            raise InputError(f"{path} has schema {schema!r}; wanted {SCHEMA}; prepare the corpus with this version")
        report = Report.of(value.pop("report"))
        splits = {name: _split(split) for name, split in value.pop("splits").items()}
        files = tuple(_file(entry) for entry in value.pop("files"))
        manifest = Manifest(splits=splits, files=files, report=report, **value)
        if manifest.dtype not in ("uint16", "uint32") or manifest.page < 1 or manifest.vocab_size < 1:
            raise ValueError
        for split in splits.values():
            if sum(shard.pages for shard in split.shards) != -(-split.tokens // manifest.page):
                raise ValueError(split.tokens)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} does not describe a corpus; delete the folder and run `gptjax prepare`") from None
    return manifest


def with_corpus_tokenizer(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """The settings with the tokenizer of the prepared corpus that they name, except those that were `given` by name.

    Of a mixture it is that of the first prepared corpus. Raises InputError where a given one contradicts the corpus.
    """
    corpora = [source for source in config.data.sources.values() if (Path(source) / MANIFEST_FILE).is_file()]
    if not corpora:
        return config
    manifest = read_manifest(Path(corpora[0]))
    taken: dict[str, Any] = {"kind": manifest.tokenizer_kind, "vocab_size": manifest.vocab_size}
    for name, value in taken.items():
        if f"tokenizer.{name}" in given and (got := getattr(config.tokenizer, name)) != value:
            raise InputError(
                f"tokenizer.{name}={got!r}, but {corpora[0]} was prepared with {value!r}; leave it out, or prepare the "
                "text again with it"
            )
    taken |= {name: getattr(config.tokenizer, name) for name in ("path", "pattern") if f"tokenizer.{name}" in given}
    return dataclasses.replace(config, tokenizer=TokenizerConfig(**taken))


def _split(value: dict[str, Any]) -> SplitEntry:
    shards = tuple(_file(entry) for entry in value.pop("shards"))
    return SplitEntry(shards=shards, starts=_file(value.pop("starts")), **value)


def _file(value: dict[str, Any]) -> FileEntry:
    entry = FileEntry(**value)
    if entry.name != Path(entry.name).name or entry.name in ("", ".", ".."):  # a manifest may not point elsewhere
        raise ValueError(entry.name)
    return entry

"""Sources that are no text files: TFDS and Hugging Face datasets, by name or by folder, and functions of the user.

TFDS data is read from ArrayRecord through its data source, with no TensorFlow; no code comes from any data.
"""

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config.plugins import resolve
from gptjax.config.section import InputError, one_line
from gptjax.data.formats import CorruptData, Document, document_of, no_field, open_file, rows_of_table

TFDS = "tfds:"
HF = "hf:"

_ROWS = 256  # of a dataset held at a time
_TFDS_CLASS = r"tensorflow_datasets\.core\.features(\.\w+)+"


@dataclass(frozen=True)
class SourceFile:
    """A part of a source that can be corrupt by itself: a file, or the whole of a source that is no file."""

    name: str
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Source:
    """The files in the order they are read, and the paths whose bytes are the source's identity, each with its kind.

    A source without paths is identified by its documents.
    """

    name: str
    files: tuple[SourceFile, ...]
    paths: tuple[tuple[str, Path], ...] = ()


def open_tfds(source: str, field: str) -> Source:
    """tfds:NAME[/CONFIG][:VERSION][:SPLIT], or tfds:FOLDER[:SPLIT] of a prepared dataset; the split is train."""
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError:
        raise InputError(f"source {source!r}: tensorflow-datasets is not installed; run: pip install gptjax") from None
    name, split = _name_and_split(source, TFDS)
    if _is_path(name):
        _refuse_foreign_classes(source, Path(name).expanduser() / "features.json")
    try:
        if _is_path(name):
            builder: Any = tfds.builder_from_directory(name)  # pyright: ignore[reportCallIssue]
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
        features = builder.info.features
        splits = builder.info.splits
        if splits and split not in splits:
            raise InputError(f"source {source!r} has no split {split!r}; wanted one of {sorted(splits)}")
        rows: Any = builder.as_data_source(split)
    except InputError:
        raise
    except Exception as error:  # its builders raise whatever their authors chose
        raise InputError(f"source {source!r} cannot be opened: {_tfds_reason(name, error)}") from None
    if field not in features:
        raise no_field(source, field, list(features))

    def part(name: str, start: int, stop: int) -> SourceFile:
        return SourceFile(name, lambda: _tfds_rows(read, name, start, stop, field))

    read = rows.__getitems__
    if not splits:  # tfds.testing.mock_data, which gives records one by one alone
        read = lambda numbers: [rows[number] for number in numbers]  # noqa: E731
        return Source(source, (part(source, 0, len(rows)),))
    files, start = [], 0
    for shard in splits[split].file_instructions:
        files.append(part(str(shard.filename), start, start + shard.examples_in_shard))
        start += shard.examples_in_shard
    paths = tuple((".array_record", Path(file.name)) for file in files)
    return Source(source, tuple(files), paths if all(path.is_file() for _, path in paths) else ())


def _refuse_foreign_classes(source: str, path: Path) -> None:
    """Raises InputError where features.json names a class that is not TFDS's own: TFDS would import its module."""
    try:
        text = path.read_text(encoding="utf-8")
        pairs: list[tuple[str, Any]] = []  # of all objects, repeated keys included
        json.loads(text, object_pairs_hook=pairs.extend)
    except (OSError, ValueError):
        return  # TFDS can't read it either, and says so
    for key, value in pairs:
        if key in ("pythonClassName", "python_class_name") and not re.fullmatch(_TFDS_CLASS, str(value)):
            raise InputError(
                f"source {source!r}: {path} names the class {value!r}; wanted a feature of TFDS itself, since no data "
                f"may name code to import"
            )


def open_hf(source: str, field: str) -> Source:
    """hf:NAME[@CONFIG][:SPLIT], or hf:FOLDER[:SPLIT] of a folder that save_to_disk wrote; the split is train."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f"source {source!r}: datasets is not installed; run: pip install 'gptjax[hf]'") from None
    name, split = _name_and_split(source, HF)
    if _is_path(name):
        paths = _saved_files(source, Path(name), split)
    else:
        name, _, config = name.partition("@")
        try:
            data: Any = datasets.load_dataset(name, config or None, split=split)
        except Exception as error:  # of the network, of the hub, of the dataset's files
            raise InputError(f"source {source!r} cannot be opened: {one_line(error, 200)}") from None
        paths = [Path(file["filename"]) for file in data.cache_files]
        if not paths or data._indices is not None:
            return Source(source, (SourceFile(source, lambda: _hf_rows(lambda: data, source, field)),))

    def part(path: Path) -> SourceFile:
        return SourceFile(str(path), lambda: _hf_rows(lambda: datasets.Dataset.from_file(str(path)), str(path), field))

    return Source(source, tuple(part(path) for path in paths), tuple((".arrow", path) for path in paths))


def open_function(source: str, field: str) -> Source:
    """MODULE:NAME of a function that gives texts or {field: text}, the same ones each time it is called.

    It may return any iterable; a grain MapDataset or IterDataset is one.
    """
    function = resolve(source, "source")
    return Source(source, (SourceFile(source, lambda: _function_rows(function, source, field)),))


def _tfds_rows(read: Callable[[list[int]], Any], name: str, start: int, stop: int, field: str) -> Iterator[Document]:
    for first in range(start, stop, _ROWS):
        numbers = list(range(first, min(first + _ROWS, stop)))
        try:
            batch = read(numbers)
        except Exception as error:  # array_record and protobuf raise many kinds for damaged bytes
            raise CorruptData(f"{name}: record {first - start + 1} cannot be read ({one_line(error, 200)})") from None
        for row, values in zip(numbers, batch):
            yield document_of(values[field], f"{name}:{row - start + 1}", field)


def _hf_rows(load: Callable[[], Any], name: str, field: str) -> Iterator[Document]:
    import pyarrow

    first = 1
    try:
        data = load()
        if field not in data.column_names:
            raise no_field(name, field, data.column_names)
        for batch in data.select_columns([field]).with_format("arrow").iter(_ROWS):
            yield from rows_of_table(batch, field, name, first)
            first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptData(f"{name}: row {first} cannot be read ({one_line(error, 200)}); the file is damaged") from None


def _function_rows(function: Callable[[], Any], source: str, field: str) -> Iterator[Document]:
    number = 0
    try:
        texts = function()
        if hasattr(texts, "__len__") and len(texts) == sys.maxsize:
            raise InputError(f"source {source!r} never ends; leave out .repeat(): a stream makes passes by itself")
        for number, value in enumerate(texts, 1):
            origin = f"{source}:{number}"
            if isinstance(value, Mapping):
                if field not in value:
                    raise no_field(origin, field, [str(key) for key in value])
                value = value[field]
            elif not isinstance(value, str):
                raise InputError(f'{origin} is a {type(value).__name__}; wanted a str or {{"{field}": "..."}}')
            yield document_of(value, origin, field)
    except InputError:
        raise
    except Exception as error:  # of the user's own code
        kind = type(error).__name__
        raise InputError(f"source {source!r} raised {kind} after text {number}: {one_line(error, 200)}") from error


def _saved_files(source: str, folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder that save_to_disk wrote, in order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json", "splits")
        if split not in splits:
            raise InputError(f"source {source!r} has no split {split!r}; wanted one of {sorted(splits)}")
        folder = folder / split
    elif split != "train":
        raise InputError(f"source {source!r} is one dataset without splits; leave out :{split}")
    if not (folder / "state.json").is_file():
        raise InputError(
            f"source {source!r} is no folder that save_to_disk wrote; for a folder of text, JSONL or Parquet files "
            f"give {str(folder)!r} itself"
        )
    return [folder / Path(entry["filename"]).name for entry in _json(folder / "state.json", "_data_files")]


def _json(path: Path, key: str) -> Any:
    with open_file(path) as file:
        try:
            return json.load(file)[key]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged; wanted the JSON that save_to_disk writes") from None


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or Path(name).exists()


def _name_and_split(source: str, scheme: str) -> tuple[str, str]:
    """Name and split: a trailing :SPLIT is no version (which begins with a digit) and no part of a path."""
    name = source.removeprefix(scheme)
    head, colon, tail = name.rpartition(":")
    is_split = colon and re.fullmatch(r"[A-Za-z_]\w*", tail) and not Path(name).exists()
    name, split = (head, tail) if is_split else (name, "train")
    if not re.match("[^@:]", name):
        raise InputError(f"source {source!r} names no dataset; wanted {scheme}NAME or {scheme}FOLDER")
    return name, split


def _tfds_reason(name: str, error: Exception) -> str:
    from tensorflow_datasets.core import registered

    if isinstance(error, registered.DatasetNotFoundError):
        wanted = re.split("[/:]", name)[0]
        close = difflib.get_close_matches(wanted, registered.list_imported_builders(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; wanted a name that tfds.list_builders() lists"
        return f"TFDS has no dataset {wanted!r}" + hint
    return one_line(error, 200)

"""Sources that are no text files: TFDS and Hugging Face datasets, by name or by folder, and functions of the user.

TFDS data is read from ArrayRecord through its data source, with no TensorFlow; no code comes from any data. Of a
dataset with splits, train is trained on and a validation or test split held out; a split that is named is read alone.
"""

import difflib
import functools
import json
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config.plugins import resolve
from gptjax.config.section import InputError, one_line
from gptjax.data.formats import CorruptData, Document, document_of, no_field, open_file, rows_of_table

TFDS = "tfds:"
HF = "hf:"

HELD_OUT = ("validation", "valid", "val", "dev", "test")  # splits that are held out; the first one that is there

_ROWS = 256  # of a dataset held at a time
_TFDS_CLASS = r"tensorflow_datasets\.core\.features(\.\w+)+"


@dataclass(frozen=True)
class SourceFile:
    """A part of a source that can be corrupt by itself: a file, or the whole of a source that is no file."""

    name: str
    read: Callable[[], Iterator[Document]]
    validation: bool = False  # all of it is held out


@dataclass(frozen=True)
class Source:
    """The files in the order they are read, and the paths whose bytes are the source's identity, each with its kind.

    A source without paths is identified by its documents. `notes` are lines that say which splits are read, and that
    files are not. Files of a validation split come before those that are trained on: of equal texts it keeps its own.
    """

    name: str
    files: tuple[SourceFile, ...]
    paths: tuple[tuple[str, Path], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_validation(self) -> bool:
        """True where the source brings the text to hold out, and none is taken from what is trained on."""
        return any(file.validation for file in self.files)


def open_tfds(source: str, field: str) -> Source:
    """tfds:NAME[/CONFIG][:VERSION][:SPLIT], or tfds:FOLDER[:SPLIT] of a prepared dataset."""
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
        chosen, notes = _choose_splits(source, list(splits or ["train"]), split)
        rows: Any = {name: builder.as_data_source(name) for name in chosen}
    except InputError:
        raise
    except Exception as error:  # its builders raise whatever their authors chose
        raise InputError(f"source {source!r} cannot be opened: {_tfds_reason(name, error)}") from None
    if field not in features:
        raise no_field(source, field, list(features))

    files, paths = [], []
    for split in chosen:
        read, start, held = rows[split].__getitems__, 0, split != chosen[-1]
        if not splits:  # tfds.testing.mock_data, which gives records one by one alone
            read = lambda numbers, own=rows[split]: [own[number] for number in numbers]  # noqa: E731
        for shard in splits[split].file_instructions if splits else [None]:
            size = shard.examples_in_shard if shard else len(rows[split])
            name = str(shard.filename) if shard else source
            files.append(SourceFile(name, functools.partial(_tfds_rows, read, name, start, start + size, field), held))
            paths.append((".array_record" + " held out" * held, Path(name)))
            start += size
    return Source(source, tuple(files), tuple(paths) if all(path.is_file() for _, path in paths) else (), notes)


def _choose_splits(source: str, names: Collection[str], named: str) -> tuple[list[str], tuple[str, ...]]:
    """The splits to read, the held-out one first, and lines that say which is held out and which are not read."""
    wanted = named or "train"
    if wanted not in names:
        raise InputError(f"source {source!r} has no split {wanted!r}; wanted one of {sorted(names)}, as {source}:SPLIT")
    held = [] if named else [name for name in HELD_OUT if name in names][:1]
    notes = [f"held out is the split {name}" for name in held]
    if unread := [name for name in names if name not in (wanted, *held)]:
        notes.append(f"splits that are not read: {', '.join(unread)}")
    return [*held, wanted], tuple(notes)


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
    """hf:NAME[@CONFIG][:SPLIT], or hf:FOLDER[:SPLIT] of a folder that save_to_disk wrote."""
    name, named = _name_and_split(source, HF)
    if not _is_path(name):
        _stay_offline_without_a_network()
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f"source {source!r}: datasets is not installed; run: pip install 'gptjax[hf]'") from None
    tables: dict[str, Any] = {}  # of a dataset that is no files
    if _is_path(name):
        chosen, paths_of, notes = _saved_splits(source, Path(name), named)
    else:
        name, _, config = name.partition("@")
        try:
            data: Any = datasets.load_dataset(name, config or None, split=named or None)
            # Of a split that is named nothing else is known; the hub may hold others.
            tables = {named: data} if named else dict(data)
            chosen, notes = ([named], ()) if named else _choose_splits(source, tables, "")
        except InputError:
            raise
        except Exception as error:  # of the network, of the hub, of the dataset's files
            then = "; without a network only what was downloaded before is read" if _offline() else ""
            raise InputError(f"source {source!r} cannot be opened: {one_line(error, 200)}{then}") from None
        paths_of = {split: [Path(file["filename"]) for file in tables[split].cache_files] for split in chosen}
    files, paths, is_files = [], [], True
    for split in chosen:
        held, table = split != chosen[-1], tables.get(split)
        if table is not None and (not paths_of[split] or table._indices is not None):
            is_files = False
            load = functools.partial(lambda table: table, table)
            files.append(SourceFile(source, functools.partial(_hf_rows, load, source, field), held))
            continue
        for path in paths_of[split]:
            load = functools.partial(datasets.Dataset.from_file, str(path))
            files.append(SourceFile(str(path), functools.partial(_hf_rows, load, str(path), field), held))
            paths.append((".arrow" + " held out" * held, path))
    return Source(source, tuple(files), tuple(paths) if is_files else (), notes)


def _stay_offline_without_a_network() -> None:
    """Keeps Hugging Face's libraries from trying for half a minute to reach a host that has no address here."""
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    if _offline() or urllib.request.getproxies() or not host:
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when they are imported


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


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


def is_saved(folder: Path) -> bool:
    """True for a folder that save_to_disk of a Hugging Face dataset wrote."""
    both = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    return both or (folder / "dataset_dict.json").is_file()


def _saved_splits(source: str, folder: Path, named: str) -> tuple[list[str], dict[str, list[Path]], tuple[str, ...]]:
    """The splits to read of a folder that save_to_disk wrote, the Arrow files of each in order, and notes."""
    chosen, folders, notes = ["train"], {"train": folder}, ()
    if (folder / "dataset_dict.json").is_file():
        chosen, notes = _choose_splits(source, _json(folder / "dataset_dict.json", "splits"), named)
        folders = {split: folder / Path(split).name for split in chosen}
    elif named:
        raise InputError(f"source {source!r} is one dataset without splits; leave out :{named}")
    paths = {}
    for split, place in folders.items():
        if not (place / "state.json").is_file():
            raise InputError(
                f"source {source!r} is no folder that save_to_disk wrote; for a folder of text, JSONL or Parquet files "
                f"give {str(folder)!r} itself"
            )
        paths[split] = [place / Path(entry["filename"]).name for entry in _json(place / "state.json", "_data_files")]
    return chosen, paths, notes


def _json(path: Path, key: str) -> Any:
    with open_file(path) as file:
        try:
            return json.load(file)[key]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged; wanted the JSON that save_to_disk writes") from None


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or Path(name).exists()


def _name_and_split(source: str, scheme: str) -> tuple[str, str]:
    """Name, and split or "": a trailing :SPLIT is no version (which begins with a digit) and no part of a path."""
    name = source.removeprefix(scheme)
    head, colon, tail = name.rpartition(":")
    is_split = colon and re.fullmatch(r"[A-Za-z_]\w*", tail) and not Path(name).exists()
    name, split = (head, tail) if is_split else (name, "")
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

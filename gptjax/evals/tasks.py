"""Tasks of `gptjax eval`: JSONL files of items, with settings in a head, as prompts and answers (docs/evaluate.md)."""

import dataclasses
import gzip
import json
import random
import re
import typing
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError, build, leaves, one_line, unknown_name
from gptjax.config.tasks import KINDS, PROMPTS, Kind, TaskConfig
from gptjax.data.image_messages import read_picture
from gptjax.data.images import Picture
from gptjax.data.sources import BUILTIN, source_paths
from gptjax.storage import file_sha256, resolve_path

HEAD = "task"  # a first line {"task": {...}} is the head
# Fields by which the kind of a file without a head is known, the most telling first.
TELLING: dict[str, Kind] = {"choices": "multiple_choice", "continuation": "cloze", "answers": "generation",
                            "text": "text"}  # fmt: skip
_FIELD = re.compile(r"\{(\w+)(?:\[(\d+)\])?\}")


@dataclass(frozen=True)
class Item:
    """One item: its number in the file from 0, its prompt, and the answers, some of them right."""

    number: int
    prompt: str
    """The prompt; the whole text where the kind is text."""
    answers: tuple[str, ...]
    """The texts to choose from; the continuation; the texts that a generated one may equal."""
    gold: tuple[int, ...]
    """Which of the answers are right."""
    pictures: tuple[Picture, ...] = ()
    """The pictures in front of the prompt."""
    group: str = ""
    """The value of the field task.by."""

    @property
    def answer(self) -> str:
        """The answer that an example shows: the first right one."""
        return self.answers[self.gold[0]]


@dataclass(frozen=True)
class Task:
    """The items of a task, and those that examples are drawn from (none: the others of the items)."""

    config: TaskConfig
    path: Path
    sha256: str
    items: tuple[Item, ...]
    examples: tuple[Item, ...]

    @property
    def name(self) -> str:
        return self.config.name or self.path.name.split(".")[0]

    def prompt(self, item: Item, seed: int) -> str:
        """The prompt of an item behind the description and its examples."""
        cfg = self.config
        shown = [e.prompt + cfg.separator + e.answer + cfg.delimiter for e in self.shots(item, seed)]
        return cfg.description + "".join(shown) + item.prompt

    def shots(self, item: Item, seed: int) -> list[Item]:
        """The examples of an item: as many others, drawn by the seed and its number, never one with its prompt."""
        if not self.config.shots:
            return []
        others = [e for e in self.examples or self.items if e.prompt != item.prompt]
        if len(others) < self.config.shots:
            raise InputError(
                f"{self.path}: shots={self.config.shots}: wanted at most {len(others)}, the other items there are"
            )
        if self.config.shots_order == "first":
            return others[: self.config.shots]
        return random.Random(f"{seed} {item.number}").sample(others, self.config.shots)


def load_task(spec: str) -> Task:
    """The task of FILE or FILE:SETTING=VALUE:..., where the settings replace those of its head.

    FILE is JSONL, plain or .gz, whose first line may be the head {"task": {...}}; a .json file that is only the head,
    and names its `items`; a text (.txt, .md), which is one item; or the name of a shipped task (capitals). Raises
    InputError, in one line that names the file and the line, for whatever is wrong with it.
    """
    file, *settings = re.split(r":(?=\w+=)", spec)
    path = _shipped().get(file, resolve_path(file))
    given = dict(_setting(spec, setting) for setting in settings)
    lines: Sequence[tuple[int, dict[str, Any]]] = ()
    if path.suffix in (".txt", ".md"):
        head, lines = {}, [(1, {"text": _decoded(path, _content(path))})]
    elif path.suffix == ".json":
        head = _json(_decoded(path, _content(path)), str(path))
    else:
        lines = list(_lines(path))
        head = lines[0][1].get(HEAD) if lines else None
        head, lines = (head, lines[1:]) if isinstance(head, dict) else ({}, lines)
    head = {**head, **given}
    if items := head.get("items"):
        lines = list(_lines(_items_file(path, str(items))))
    if not lines:
        raise InputError(f"{path} has no items; wanted a JSON object a line, or a head whose items names their file")
    if "kind" not in head:
        fields = lines[0][1]
        head["kind"] = next((kind for name, kind in TELLING.items() if name in fields), None)
        if head["kind"] is None:
            raise InputError(
                f"{path} has no kind, and its first item has the fields {', '.join(fields)}; wanted a first line "
                f'{{"task": {{"kind": ...}}}} or {path}:kind=..., of {", ".join(KINDS)}'
            )
    try:
        config = build(TaskConfig, dict(leaves(TaskConfig())) | head)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    source = _items_file(path, config.items) if config.items else path
    digest = file_sha256(source)
    items = tuple(_items(source, lines, config))
    if not items:
        raise InputError(f"{source} has no items where {' and '.join(config.where)}")
    examples = tuple(_examples(path.parent / config.shots_file, config)) if config.shots_file else ()
    return Task(config, path, digest, items, examples)


def _shipped() -> dict[str, Path]:
    """The files of the tasks that come with the package, by name."""
    folders = [folder / "configs" / "tasks" for folder in Path(__file__).parents[1:3]]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.jsonl"))}


def _items_file(path: Path, name: str) -> Path:
    """The file of the items that a head names: beside it, or a source of the package."""
    return source_paths(name)[0][0] if name.startswith(BUILTIN) else path.parent / name


def _setting(spec: str, setting: str) -> tuple[str, Any]:
    """A setting of the command line, of the type of its field; a list has one member."""
    name, _, value = setting.partition("=")
    kinds = {field.name: typing.get_type_hints(TaskConfig)[field.name] for field in dataclasses.fields(TaskConfig)}
    if name not in kinds:
        raise InputError(f"{spec}: {unknown_name(name, list(kinds))}")
    if typing.get_origin(kinds[name]) is tuple:
        return name, [value]
    if kinds[name] is not int:
        return name, value
    if not value.isdecimal():
        raise InputError(f"{spec}: {name}={value}: wanted a whole number")
    return name, int(value)


def _content(path: Path) -> bytes:
    """The bytes of a file, unpacked where it is .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path} can't be unpacked; the file is damaged or no gzip") from None
    except OSError as error:
        raise InputError(
            f"{path} can't be read: {error.strerror or one_line(error)}; wanted the file of a task, or one of "
            f"{', '.join(_shipped())}"
        ) from None


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, its JSON object) of each line that is not empty."""
    for number, line in enumerate(_decoded(path, _content(path)).split("\n"), 1):
        if line.strip():
            yield number, _json(line, f"{path} line {number}")


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {one_line(error, 80)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: wanted a JSON object, got a {type(value).__name__}")
    return value


def _examples(path: Path, config: TaskConfig) -> Iterator[Item]:
    lines = [(number, fields) for number, fields in _lines(path) if not isinstance(fields.get(HEAD), dict)]
    return _items(path, lines, dataclasses.replace(config, where=()))


def _items(path: Path, lines: Sequence[tuple[int, dict[str, Any]]], config: TaskConfig) -> Iterator[Item]:
    conditions = [condition.partition("=")[::2] for condition in config.where]
    for number, (line, fields) in enumerate(lines):
        where = f"{path} line {line}"
        if all(str(_field(fields, name, where)) == value for name, value in conditions):
            item = _item(number, fields, config, where)
            if fields.get(config.image) is not None:
                item = _with_picture(item, read_picture(fields[config.image], where, path.parent), config, where)
            group = str(_field(fields, config.by, where)) if config.by else ""
            yield dataclasses.replace(item, group=group)


def _with_picture(item: Item, picture: Picture, config: TaskConfig, where: str) -> Item:
    """The item behind a picture; raises InputError for a task whose items can have none."""
    if config.kind == "text" or config.shots:
        got = f"shots={config.shots}" if config.shots else "kind=text"
        raise InputError(f"{where} has a picture, its {config.image}; wanted no {got}, where pictures are not shown")
    return dataclasses.replace(item, pictures=(picture,))


def _item(number: int, fields: Mapping[str, Any], config: TaskConfig, where: str) -> Item:
    if config.kind == "text":
        text = _filled(config.text, fields, where)
        if not text:
            raise InputError(f"{where}: its text is empty; wanted at least one character")
        return Item(number, text, (), ())
    prompt = _filled(config.prompt or PROMPTS[config.kind], fields, where)
    if config.kind == "cloze":
        return Item(number, prompt, (_filled(config.continuation, fields, where),), (0,))
    if config.kind == "generation":
        answers = _texts(fields, config.answers, where)
        if not answers:
            raise InputError(f"{where}: {config.answers} is empty; wanted at least one answer")
        return Item(number, prompt, answers, tuple(range(len(answers))))
    choices = _texts(fields, config.choices, where)
    if len(choices) < 2 or not all(choices):
        raise InputError(f"{where}: {config.choices} are {list(choices)}; wanted at least two texts, none empty")
    if config.labels and len(config.labels) < len(choices):
        raise InputError(f"{where}: {len(choices)} choices, but task.labels names {len(config.labels)}; name more")
    found = _field(fields, config.gold, where)
    gold = tuple(_index(g, choices, config, where) for g in (found if isinstance(found, list) else [found]))
    if not gold:
        raise InputError(f"{where}: {config.gold} is empty; wanted at least one right choice")
    return Item(number, prompt, config.labels[: len(choices)] or choices, gold)


def _index(gold: Any, choices: tuple[str, ...], config: TaskConfig, where: str) -> int:
    """The place of a right choice, which is given as a number from 0, as its text or as its label."""
    if isinstance(gold, str):
        names = [*choices, *config.labels[: len(choices)]]
        if names.count(gold) == 1:
            return names.index(gold) % len(choices)
    elif type(gold) is int and 0 <= gold < len(choices):
        return gold
    raise InputError(f"{where}: {config.gold}={gold!r}: wanted 0 to {len(choices) - 1}, or one of its choices")


def _field(fields: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        raise InputError(f"{where} has no field {name!r}; it has {', '.join(fields) or 'none'}")
    return fields[name]


def _texts(fields: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    found = _field(fields, name, where)
    texts = found if isinstance(found, list) else [found]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise InputError(f"{where}: {name} is {one_line(str(found), 60)}; wanted texts")
    return tuple(str(text) for text in texts)


def _filled(template: str, fields: Mapping[str, Any], where: str) -> str:
    """A template with the item's fields in the place of {name} and, of a list, {name[0]}; other braces stay."""

    def value(match: re.Match[str]) -> str:
        found, index = _field(fields, match[1], where), match[2]
        if index is not None:
            if not isinstance(found, list) or int(index) >= len(found):
                raise InputError(f"{where}: {match[0]}: there is no number {index} in its {match[1]}")
            found = found[int(index)]
        if not isinstance(found, str | int | float):
            raise InputError(f"{where}: {match[0]} is {one_line(str(found), 60)}; wanted a text")
        return str(found)

    return _FIELD.sub(value, template)

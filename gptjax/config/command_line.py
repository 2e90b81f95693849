"""Command lines over configs: any setting by its dotted name, typed, with help from the field's docstring."""

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import io
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptjax.config import STAGES, TrainConfig
from gptjax.config.section import InputError, build, leaves, one_line, unknown_name

T = TypeVar("T")
HELP = ("-h", "--help")
VERBS_ELSEWHERE = {"resume": "pretrain RUN", "continue": "pretrain RUN", "finetune": "pretrain RECIPE --init RUN",
                   "sample": "generate RUN", "evaluate": "eval RUN", "test": "eval RUN"}  # fmt: skip


def parse(default: T, args: list[str], prog: str, description: str = "") -> T:
    """The config `default` with the settings in args; `--help` prints every setting and exits with 0.

    Raises InputError, in one line, for an unknown setting (with the nearest name) and for a value that is not valid.
    """
    import tyro

    known = [name.replace("_", "-") for name, _ in leaves(default)]
    for arg in args:
        if arg.startswith("--") and arg != "--help":
            name = arg[2:].split("=", 1)[0].replace("_", "-")
            switched_off = re.sub(r"(^|\.)no-", r"\1", name)
            if name == "resume":
                raise InputError(
                    "there is no --resume: the same command, run again, goes on, and so does gptjax pretrain RUN"
                )
            if name not in known and switched_off not in known:
                raise InputError(unknown_name(f"--{name}", [f"--{k}" for k in known]))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _wide(unless="--help" in args or "-h" in args):
            return tyro.cli(
                type(default), default=default, args=args, prog=prog, description=description or type(default).__doc__
            )
    except SystemExit as e:
        if e.code:
            raise InputError(_one_line(errors.getvalue())) from None
        raise


def given_names(args: list[str]) -> set[str]:
    """The dotted names of the settings in the arguments."""
    return {arg[2:].split("=", 1)[0].replace("-", "_") for arg in args if arg.startswith("--")}


@contextlib.contextmanager
def _wide(unless: bool):
    """Keeps tyro from wrapping errors, which become one line; help is wrapped for the terminal."""
    before = os.environ.get("COLUMNS")
    if not unless:
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """The first part of tyro's framed error, without colours (of a terminal), title and frame, reworded for numbers."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)
    lines = [line.strip(" \u2502") for line in box.splitlines()][1:]  # the first is the title
    rules = [not line.strip("-\u2500\u256d\u256e\u2570\u256f\u251c\u2524") for line in lines]
    content = itertools.dropwhile(lambda pair: pair[1], zip(lines, rules, strict=True))
    text = " ".join(line for line, _ in itertools.takewhile(lambda pair: not pair[1], content))
    if ours := re.match(r"Error parsing [A-Za-z_.]+: ([a-z_.]+=.*)", text):
        return ours[1]  # raised by the config itself
    if number := re.match(r"Error parsing (--[\w.-]+): .*?(int|float).*: '(.*)'$", text):
        return f"{number[1]}: got {number[3]!r}, wanted {'a whole number' if number[2] == 'int' else 'a number'}"
    return text.removeprefix("Error parsing ").rstrip(".") + "; see --help"


@dataclass(frozen=True)
class Recipe:
    """A Python file whose functions return the configs of a model's life."""

    path: Path
    doc: str
    sha256: str
    module: Any

    def config(self, stage: str, size: str = "") -> TrainConfig:
        """The config of a stage at a size; raises InputError where the recipe fails or has no such stage or dial.

        A recipe with a dial is a function with an argument `size`, a whole number or a word, that has a default.
        """
        function: Callable[..., Any] | None = getattr(self.module, stage, None)
        if not callable(function):
            raise InputError(f"{self.path} has no function {stage}(); wanted one that returns the stage's config")
        dial = {"size": self._dial(function, stage, size)} if size else {}
        try:
            config = function(**dial)
        except InputError:
            raise
        except Exception as e:
            raise _failure(self.path, f"{stage}()", e) from e
        kind = STAGES[stage]
        if not isinstance(config, kind):
            raise InputError(f"{self.path}: {stage}() returned {config!r}; wanted a gptjax.config.{kind.__name__}")
        return build(kind, dict(leaves(config)))  # whose values must be of the types that config.json gives back

    def _dial(self, function: Callable[..., Any], stage: str, size: str) -> int | str:
        dial = inspect.signature(function).parameters.get("size")
        if dial is None:
            raise InputError(f"--size {size}: {self.path} has no dial; wanted {stage}(size=...) there, or no --size")
        if not isinstance(dial.default, int):
            return size
        if not size.isdecimal():
            raise InputError(f"--size {size}: wanted a whole number for {self.path}, e.g. --size {dial.default}")
        return int(size)


def take(args: list[str], flag: str) -> tuple[str, list[str]]:
    """Takes `--flag VALUE` or `--flag=VALUE` out of the arguments; the value is empty where it is not given."""
    value, rest, words = "", [], iter(args)
    for word in words:
        name, equals, given = word.partition("=")
        if name != f"--{flag}":
            rest.append(word)
        elif not (value := given if equals else next(words, "")):
            raise InputError(f"--{flag}: a value is missing")
    return value, rest


def positional(args: list[str], name: str, example: str) -> tuple[str, list[str]]:
    """Takes the first argument, which must be a word; where help is asked for instead, gives back the name."""
    if args and args[0] in HELP:
        return name, args
    if not args or args[0].startswith("-"):
        got = f"got {args[0]}" if args else "got nothing"
        raise InputError(f"{name} is missing ({got}); wanted e.g. {example}")
    return args[0], args[1:]


def positionals(args: list[str], name: str, example: str) -> tuple[list[str], list[str]]:
    """Takes the words before the first setting, of which there must be one at least."""
    first, args = positional(args, name, example)
    words = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    return [first, *words], args[len(words) :]


def nothing_left(args: list[str], usage: str) -> None:
    """Refuses any argument of a verb without settings, and prints the usage where help is asked for."""
    if args and args[0] in HELP:
        print(f"usage: {usage}")
        raise SystemExit(0)
    if args:
        raise InputError(f"unexpected {args[0]!r}; wanted {usage}")


def load_recipe(name: str) -> Recipe:
    """The recipe at a path, or the shipped one of that name (`quickstart`). Its code is run."""
    shipped = [folder / "configs" for folder in Path(__file__).parents[1:3]]
    places = [Path(name), *(folder / f"{name}.py" for folder in shipped)]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        names = sorted({p.stem for folder in shipped for p in folder.glob("*.py")})
        close = difflib.get_close_matches(name, names, n=1)
        meant = f", the nearest is {close[0]}" if close else ""
        raise InputError(f"{name}: no such recipe{meant}; wanted a Python file, a run, or one of {', '.join(names)}")
    spec = importlib.util.spec_from_file_location(f"gptjax_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{name}: not a Python file; wanted a recipe like configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    try:
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode  # no __pycache__ beside the user's recipe
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as e:
        raise _failure(path, "the recipe", e) from e
    finally:
        sys.dont_write_bytecode = before
    return Recipe(path, (module.__doc__ or "").strip(), hashlib.sha256(path.read_bytes()).hexdigest(), module)


def _failure(path: Path, what: str, error: Exception) -> InputError:
    """An error of a recipe's own code, with the last line of the recipe that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return InputError(f"{where}: {what} failed with {type(error).__name__}: {one_line(error)}")


def unknown_verb(args: list[str], verbs: Collection[str]) -> InputError:
    """The error for words that begin with no verb, with the nearest one, or what does its work here."""
    words = (" ".join(args[:2]), args[0])
    near = (difflib.get_close_matches(word, verbs, n=1, cutoff=0.7) for word in words)
    close = VERBS_ELSEWHERE.get(args[0]) or next((found[0] for found in near if found), "")
    return InputError(
        f"there is no verb {args[0]!r}; " + (f"did you mean {close!r}?" if close else "see gptjax --help")
    )


def origins(default: Any, recipe: Any, config: Any) -> dict[str, str]:
    """The source of each setting of `config` by its name: the command line, the recipe or the default."""
    base, written = dict(leaves(default)), dict(leaves(recipe))
    return {
        name: "command line" if value != written[name] else "recipe" if value != base[name] else "default"
        for name, value in leaves(config)
    }

"""Base of all groups of settings: checks with full names, a flat view by dotted name, and a strict way back."""

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Wrong input of the user. The message is one line: what, got, wanted, what to do."""


def one_line(error: BaseException | str, most: int = 300) -> str:
    """The message of an error as one line of at most `most` characters; its type where it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


class Section:
    """Base of every config: named checks whose messages carry the full dotted name."""

    section: ClassVar[str] = ""

    def dotted(self, name: str) -> str:
        return f"{self.section}.{name}" if self.section else name

    def require(self, ok: bool, name: str, wanted: str, then: str = "") -> None:
        """Raises InputError with the field, its value, the wanted value and, if given, what to do, unless `ok`."""
        if not ok:
            advice = f"; {then}" if then else ""
            value = operator.attrgetter(name)(self)
            raise InputError(f"{self.dotted(name)}={value!r}: wanted {wanted}{advice}")

    def require_numbers(self, low: float, high: float, *names: str) -> None:
        """Raises InputError unless each named field is a finite number with low <= value <= high."""
        for name in names:
            value = getattr(self, name)
            bounds = f"at least {low:g}" if math.isinf(high) else f"a number from {low:g} to {high:,.10g}"
            self.require(math.isfinite(value) and low <= value <= high, name, bounds)

    def require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self.require(math.isfinite(value) and value > 0, name, "a finite number above 0")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every setting as (dotted name, value), in the order of the fields."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


NAMES_ELSEWHERE = {  # of nanoGPT, nanochat and Hugging Face's Trainer
    "lr": "learning-rate", "max-iters": "steps", "max-steps": "steps", "num-iterations": "steps", "epochs": "steps",
    "num-train-epochs": "steps", "warmup-iters": "warmup-steps", "grad-clip": "clip-norm", "max-grad-norm": "clip-norm",
    "bf16": "dtype", "fp16": "dtype", "dataset": "source", "max-seq-length": "length",
    "block-size": "length", "n-layer": "num-layers", "n-head": "num-heads", "n-embd": "width", "hidden-size": "width",
    "out-dir": "run-dir", "output-dir": "run-dir", "gradient-accumulation-steps": "accumulate",
    "per-device-train-batch-size": "batch-size",
}  # fmt: skip


def unknown_name(name: str, known: list[str]) -> str:
    """The error message for an unknown setting, with the nearest known one."""
    last_part = name.lstrip("-").rsplit(".", 1)[-1]
    elsewhere = NAMES_ELSEWHERE.get(last_part.replace("_", "-"))
    # The last part counts most: --model.widht is nearest to model.width, and so is --widht.
    last = {k: k.lstrip("-").rsplit(".", 1)[-1] for k in known}
    close = [k for k in known if last[k].replace("_", "-") == elsewhere]
    # Long names that differ in one part score high; a short one that is alike by chance does not.
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close and (near := difflib.get_close_matches(last_part, last.values(), n=1)):
        close = [k for k in known if last[k] == near[0]]  # --widht is meant for --model.width
    return f"there is no setting {name}" + (f"; did you mean {close[0]}?" if close else "; see --help for all")


def build(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Makes a config from {dotted name: value}; raises InputError for unknown or missing names and wrong types."""
    hints = typing.get_type_hints(cls)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name.split(".", 1)[0] not in kinds:
            raise InputError(unknown_name(prefix + name, [prefix + k for k in kinds]))
    fields = {}
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            inner = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
            fields[name] = build(typing.cast(type, kind), inner, f"{prefix}{name}.")
        elif name not in values:
            raise InputError(f"setting {prefix + name!r} is missing; wanted every setting of {cls.__name__}")
        else:
            fields[name] = _checked(prefix + name, values[name], kind)
    return cls(**fields)


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value, converted from JSON to the field's type (a list to a tuple, 1 to 1.0); InputError for others."""
    if typing.get_origin(kind) is Literal:
        ok, wanted = value in typing.get_args(kind), f"one of {typing.get_args(kind)}"
    elif typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)[0]
        ok = isinstance(value, list | tuple)
        value, wanted = tuple(_checked(name, v, of) for v in value) if ok else value, f"a list of {of.__name__}"
    elif kind is float:
        ok, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        value = float(value) if ok else value
    else:
        ok, wanted = type(value) is kind, f"a value of type {kind.__name__}"
    if not ok:
        raise InputError(f"{name}={value!r}: wanted {wanted}")
    return value

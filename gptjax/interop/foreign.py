"""A config.json of transformers, whose values are checked as they are read."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from gptjax.config.section import InputError, one_line

MOST_JSON = 32 * 2**20
LAYERS, MOST_LAYERS, MOST_SIZE = ("n_layer", "num_hidden_layers"), 10_000, 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError where it is none, or larger than any that comes with a model."""
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"it has {size:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: wanted a JSON object, got a {type(values).__name__}")
    return values


class ForeignConfig:
    """The values of a config.json; a missing one is its default."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def error(self, name: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self.path}: {self.prefix}{name}={value!r} is not supported; wanted {wanted}")

    def inner(self, name: str, defaults: dict[str, Any] | None = None) -> "ForeignConfig":
        """The object under a name; a value that it has not, or has as null, is its default."""
        values = {} if self.values.get(name) is None else self.values[name]
        if not isinstance(values, dict):
            raise self.error(name, values, "an object")
        stated = {key: value for key, value in values.items() if value is not None or key not in (defaults or {})}
        return ForeignConfig(self.path, (defaults or {}) | stated, f"{self.prefix}{name}.")

    def stated(self, name: str) -> Any:
        """The value, which may be null but not missing."""
        if name not in self.values:
            raise InputError(f"{self.path}: {self.prefix}{name} is missing; wanted its value, or null")
        return self.values[name]

    def only(self, name: str, *allowed: Any) -> Any:
        """The value, which is one of those allowed; the first of them where it is missing."""
        value = self.values.get(name, allowed[0])
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise self.error(name, value, " or ".join(map(repr, allowed)))
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.values.get(name)
        value = default if value is None else value
        most = MOST_LAYERS if name in LAYERS else MOST_SIZE
        if type(value) is not int or not 1 <= value <= most:
            large = type(value) is int and value > most
            raise self.error(name, value, f"at most {most:,}" if large else "a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(name, value, "a number above 0")
        return float(value)

    def whole(self, name: str, default: int) -> int:
        """A whole number from 0 on."""
        value = self.values.get(name, default)
        return value if value == 0 and type(value) is int else self.size(name, default)

    def softcap(self, name: str, default: float | None) -> float:
        """A number above 0; 0 for null."""
        return 0.0 if self.values.get(name, default) is None else self.number(name, default or 0.0)

    def default(self, name: str, value: Any) -> None:
        """Gives a value that is missing or null the one that the family has then."""
        if self.values.get(name) is None:
            self.values = self.values | {name: value}

    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The type that the model computes in: bfloat16 where that is what it is stored in."""
        name = "dtype" if "dtype" in self.values else "torch_dtype"
        value = self.only(name, "float32", "float16", "bfloat16", None)
        return "bfloat16" if value == "bfloat16" else "float32"

"""A user's own functions by name: `module:name` in a recipe or on the command line, the function itself from Python.

Only what the user gives to a training verb or to the Python API is imported. A run's folder is data: the verbs that
read one never import what its config.json names.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from gptjax.config.section import InputError

_GIVEN: dict[str, Callable[..., Any]] = {}


def register(function: Callable[..., Any]) -> str:
    """The name `module:name` under which `resolve` finds this function, in this process, wherever it was defined."""
    if isinstance(function, functools.partial):
        raise InputError(f"{function}: a partial has no name of its own; wanted a function, give it one with def")
    name = f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    _GIVEN[name] = function
    return name


def is_registered(name: str) -> bool:
    """Whether `resolve` finds the function with no import, since this process gave it."""
    return name in _GIVEN


def is_name(text: str) -> bool:
    """Whether the text has the form module:name, with Python's identifiers."""
    module, colon, name = text.partition(":")
    parts = [*module.split("."), *name.replace("<locals>.", "").split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def optional(name: str, setting: str) -> Callable[..., Any] | None:
    """The function that a setting names, as `resolve` finds it; None where the setting is empty."""
    return resolve(name, setting) if name else None


def resolve(name: str, setting: str) -> Callable[..., Any]:
    """The function that a setting names; raises InputError where there is none. Its module is imported: code is run."""
    if name in _GIVEN:
        return _GIVEN[name]
    module, _, path = name.partition(":")
    wanted = f"{setting}={name!r}: wanted module:name of a function that Python can import here"
    if not is_name(name):
        raise InputError(wanted)
    here = os.getcwd()
    sys.path.append(here)  # last, so that a file beside the user hides no library
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as e:  # of the user's own module, besides those of one that is not there
        kind = "" if isinstance(e, ImportError | AttributeError) else f"{type(e).__name__}: "
        raise InputError(f"{wanted} ({kind}{' '.join(str(e).split())})") from e
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise InputError(f"{wanted}, got a {type(found).__name__}")
    return found

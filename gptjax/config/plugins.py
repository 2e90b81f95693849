"""Functions of the user by name: `module:name` in a recipe or on the command line, the function itself from Python.

Only names given to a training verb or to the Python API are imported. A run's folder is data: the verbs that read one
never import the modules that its config.json names.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from gptjax.config.section import InputError, one_line

_REGISTERED: dict[str, Callable[..., Any]] = {}


def register(function: Callable[..., Any]) -> str:
    """Registers a function in this process, and returns the name `module:name` by which `resolve` finds it."""
    if isinstance(function, functools.partial):
        raise InputError(f"{function}: a partial has no name of its own; wanted a function, give it one with def")
    name = f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    _REGISTERED[name] = function
    return name


def is_registered(name: str) -> bool:
    """True where `resolve` finds the function without an import."""
    return name in _REGISTERED


def is_name(text: str) -> bool:
    """True where the text has the form module:name of Python identifiers."""
    module, colon, name = text.partition(":")
    parts = [*module.split("."), *name.replace("<locals>.", "").split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def optional(name: str, setting: str) -> Callable[..., Any] | None:
    """The function that a setting names, see `resolve`; None where the setting is empty."""
    return resolve(name, setting) if name else None


def resolve(name: str, setting: str) -> Callable[..., Any]:
    """The function that a setting names, whose module is imported; raises InputError where there is none."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, path = name.partition(":")
    wanted = f"{setting}={name!r}: wanted module:name of a function that Python can import here"
    if not is_name(name):
        raise InputError(wanted)
    here = os.getcwd()
    sys.path.append(here)  # last, so that a file in the working folder hides no library
    try:
        function: Any = importlib.import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except Exception as e:  # whatever the user's module raises, too
        kind = "" if isinstance(e, ImportError | AttributeError) else f"{type(e).__name__}: "
        raise InputError(f"{wanted} ({kind}{one_line(e)})") from e
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise InputError(f"{wanted}, got a {type(function).__name__}")
    return function

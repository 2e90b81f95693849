"""gptjax trains GPTs in JAX and Flax, from a folder of text to a model that talks.

`gptjax.recipe`, `train`, `load`, `generate` and `evaluate` are the Python API (gptjax/api.py); settings are the
dataclasses of `gptjax.config`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.api import evaluate, generate, load, override, recipe, train

__version__ = "0.1.0"

__all__ = ["evaluate", "generate", "load", "override", "recipe", "train"]


def __getattr__(name: str) -> Any:
    # On demand, for jax takes seconds to import, and `gptjax --help` needs none of it.
    if name in __all__:
        from gptjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `gptjax.training.loop` the function: importing the module gptjax/train.py would put that in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

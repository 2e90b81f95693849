"""gptjax trains GPTs in JAX and Flax, from a folder of text to a model that talks.

`gptjax.recipe`, `train`, `load`, `generate`, `chat`, `evaluate` and `export` are the Python API (gptjax/api.py);
settings are the dataclasses of `gptjax.config`.
"""

from typing import TYPE_CHECKING, Any

from gptjax.runtime.versions import __version__

if TYPE_CHECKING:
    from gptjax.api import chat, evaluate, export, generate, load, override, recipe, train

__all__ = ["__version__", "chat", "evaluate", "export", "generate", "load", "override", "recipe", "train"]


def __getattr__(name: str) -> Any:
    # On demand: jax takes seconds to import, and `gptjax --help` needs none of it.
    if name in __all__:
        from gptjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")

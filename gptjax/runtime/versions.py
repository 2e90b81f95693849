"""Installed versions, and the user's cache folder."""

import importlib.metadata
import os
from pathlib import Path

__version__ = "0.1.0"

PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")  # those that a run's numbers depend on


def version(package: str) -> str:
    """The version of a package; empty where it is not installed. A checkout of gptjax counts as installed."""
    if package == "gptjax":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The versions of PACKAGES."""
    return {name: version(name) for name in PACKAGES}


def cache_folder() -> Path:
    """The user's folder of files that can be made again: compiled programs, mirrors of buckets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax"

"""What is installed here, and where files are kept for this user from one run to the next."""

import importlib.metadata
import os
from pathlib import Path

__version__ = "0.1.0"

PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")  # what a run's numbers depend on


def version(package: str) -> str:
    """The version of a package; empty where it is not installed. A mere checkout of gptjax has one, too."""
    if package == "gptjax":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on."""
    return {name: version(name) for name in PACKAGES}


def cache_folder() -> Path:
    """This user's folder of what can be had again: compiled programs, flags that XLA knows, mirrors of buckets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax"

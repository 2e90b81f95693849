"""The folder of compiled programs, and who may write to it."""

import os
import stat
from pathlib import Path

from gptjax.config.section import InputError
from gptjax.runtime.versions import cache_folder


def compile_cache_folder() -> Path:
    """The folder of this user's compiled programs."""
    return cache_folder() / "compiled"


def others_can_write(folder: Path) -> bool:
    """True where a folder belongs to another user, or is open to others."""
    status = folder.stat()
    return status.st_uid != os.getuid() or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def enable_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder. Call it before anything is compiled.

    What lies there is run, so a folder that others can write to is refused with InputError.
    """
    folder = compile_cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder} can't be made ({e.strerror}); set XDG_CACHE_HOME, or --no-compile-cache") from e
    if others_can_write(folder):
        raise InputError(f"{folder} can be written by others; run `chmod 700 {folder}`, or give --no-compile-cache")
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

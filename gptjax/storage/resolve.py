"""Texts to paths, and paths to the file system or bucket that holds them."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError
from gptjax.storage.bucket import SCHEMES, Bucket, open_bucket
from gptjax.storage.disk import Disk

DISK = Disk()


def resolve_path(text: str | os.PathLike[str]) -> Path:
    """The path of a text, in a file system or, with the same methods, in a bucket; not made absolute.

    Raises InputError for another scheme, for a bucket without a folder, and where a package is missing.
    """
    written = os.fspath(text)
    scheme, separator, rest = written.partition("://")
    if not separator or not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return Path(text)
    wanted = "wanted a folder, or " + " or ".join(f"{name}://BUCKET/FOLDER" for name in SCHEMES)
    if scheme not in SCHEMES:
        raise InputError(f"{written}: there is no store for {scheme}://; {wanted}")
    parts = rest.rstrip("/").split("/")
    if len(parts) < 2 or {"", ".", ".."} & set(parts):
        raise InputError(f"{written}: does not name a folder in a bucket; {wanted}")
    open_bucket(scheme)
    from etils import epath

    path: Any = epath.Path(written.rstrip("/"))
    return path


def filesystem(path: os.PathLike[str]) -> Disk | Bucket:
    """The operations on a path made by `resolve_path`."""
    scheme, separator, _ = os.fspath(path).partition("://")
    return open_bucket(scheme) if separator and scheme in SCHEMES else DISK


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with filesystem(path).open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(text: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, whole or not at all, and makes its folder; raises InputError where it can't."""
    path = resolve_path(text)
    try:
        filesystem(path).make_folder(path.parent)
        filesystem(path).write(path, data)
    except OSError as e:
        raise InputError(f"{path}: can't be written ({e.strerror}); free the disk, or give another place") from e


def check_file(text: str | os.PathLike[str]) -> None:
    """Raises InputError where `write_file` could not write later; an existing file is left as it is."""
    path = resolve_path(text)
    if filesystem(path).is_folder(path):
        raise InputError(f"{path}: there is a folder of that name; wanted a file")
    filesystem(path).make_writable(path.parent, str(path), "give another place")


def write_json(text: str | os.PathLike[str], document: Any) -> None:
    """Writes a document as `write_file` does; NaN and infinity in Python's spelling, which is not strict JSON."""
    write_file(text, (json.dumps(document, indent=1) + "\n").encode())

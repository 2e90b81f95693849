"""Objects of a bucket, through fsspec, which etils.epath and so Orbax use too.

An object store writes an object whole or not at all, but can neither append to an object nor rename one, and has no
locks. So a folder is deleted seal first, a step is moved by copying, a run is held by a lease (lease.py), and files
that a run appends to or maps into memory are kept in a mirror on this machine (mirror.py) and uploaded whole.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.section import InputError, one_line
from gptjax.storage.disk import StorageError, probe_in

READ_BYTES = 32 << 20  # of one request when a large object is read sequentially


class Scheme(NamedTuple):
    """A store: its fsspec protocol, its package, the extra that installs that, and whether Orbax writes there itself.

    Orbax 0.12.8 writes to gs:// directly, each process its own shards; of s3:// it makes s3:/ and fails.
    """

    protocol: str
    package: str
    extra: str
    direct: bool


SCHEMES = {
    "gs": Scheme("gcs", "gcsfs", "gcs", direct=True),
    "s3": Scheme("s3", "s3fs", "s3", direct=False),
}


def is_transient(error: BaseException | None) -> bool:
    """True where an outage of a store caused the error, directly or through a chain of causes."""
    while error is not None:
        if isinstance(error, StorageError):
            return error.may_pass
        error = error.__cause__
    return False


@functools.cache
def open_bucket(scheme: str) -> "Bucket":
    """The store of a scheme; raises InputError where its package is not installed."""
    _, package, extra, _ = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{scheme}:// needs the package {package}; install it with: pip install 'gptjax[{extra}]'")
    return Bucket(scheme)


class Bucket:
    """The objects of a store, with the methods of Disk, whose docstrings apply."""

    def __init__(self, scheme: str):
        self._scheme = SCHEMES[scheme]
        self.direct = self._scheme.direct
        self._leases: dict[str, Any] = {}
        self._mirrors: dict[str, Any] = {}

    @functools.cached_property
    def fs(self) -> Any:
        """The file system of fsspec, without a cache of listings, since tensorstore and other hosts write too."""
        import fsspec
        from fsspec.config import conf

        protocol = self._scheme.protocol
        settings = conf.setdefault(protocol, {})  # epath makes its own file system from these
        settings["use_listings_cache"] = False
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "default")  # "default" is Google itself
        if protocol == "gcs" and emulator != "default":
            settings["token"] = "anon"
            # gcsfs reads STORAGE_EMULATOR_HOST; tensorstore, which writes Orbax's arrays, another variable.
            url = emulator if "://" in emulator else f"http://{emulator}"
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", url)
        return fsspec.filesystem(protocol)

    def absolute(self, path: Path) -> Path:
        return path

    def make_writable(self, folder: Path, what: str, then: str = "give another --run-dir") -> None:
        probe = probe_in(folder)
        try:
            self.write(probe, b"")
            self._delete(probe)
        except OSError as e:
            raise InputError(f"{folder}: {what} can't be written there ({e.strerror}); {then}") from e

    # Reading.

    def is_file(self, path: Path) -> bool:
        return self._kind(path) == "file"

    def is_folder(self, path: Path) -> bool:
        return self._kind(path) == "directory"

    def names(self, folder: Path) -> list[str]:
        """Names of everything in the folder; empty where there is nothing. Raises StorageError where listing fails."""
        try:
            with _plain_errors(folder):
                keys = [key.rstrip("/") for key in self.fs.ls(str(folder), detail=False)]
        except FileNotFoundError:
            return []
        return [key.rsplit("/", 1)[-1] for key in keys if key != self._key(folder)]

    def sizes(self, folder: Path) -> dict[str, int]:
        return {name: info["size"] for name, info in self.infos(folder).items()}

    def infos(self, folder: Path) -> dict[str, Any]:
        """The store's metadata of every object below the folder, by relative path; of a single object, by ""."""
        with _plain_errors(folder):
            infos = self.fs.find(str(folder), detail=True)
        start = len(self._key(folder)) + 1
        # A name that ends with / only marks a folder.
        return {key[start:]: info for key, info in infos.items() if not key.endswith("/")}

    def seconds(self, path: Path) -> float:
        with _plain_errors(path):
            return self.fs.modified(str(path)).timestamp()

    def read(self, path: Path) -> bytes:
        with _plain_errors(path):
            return self.fs.cat_file(str(path))

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[Any]:
        with _plain_errors(path), self.fs.open(str(path), "rb", block_size=READ_BYTES) as file:
            yield file

    @contextlib.contextmanager
    def readable(self, folder: Path) -> Iterator[Path]:
        if self.direct:
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="gptjax-") as parent:
            copy = Path(parent) / folder.name
            for name in self.sizes(folder):
                self.download(folder / name, copy / name)
            yield copy

    def download(self, path: Path, to: Path) -> None:
        """Copies an object to a file, whole or not at all."""
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{to.name}.{os.getpid()}")
        with _plain_errors(path):
            self.fs.get_file(str(path), str(temporary))
        os.replace(temporary, to)

    # Writing.

    def make_folder(self, folder: Path) -> None:
        """Does nothing: a folder exists with its first object."""

    def write(self, path: Path, data: bytes, temporary: Path | None = None) -> None:
        with _plain_errors(path):
            self.fs.pipe_file(str(path), data)

    def create(self, path: Path, data: bytes) -> None:
        """Writes a new object; of several writers one succeeds. Raises FileExistsError where it exists."""
        with _plain_errors(path):
            self.fs.pipe_file(str(path), data, mode="create")

    def remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError), _plain_errors(path):
            self.fs.rm(str(path), recursive=True)

    def discard(self, folder: Path, seal: str) -> None:
        """Deletes the seal first: from then on the folder counts as unfinished, whatever is left of it."""
        self._delete(folder / seal)
        self.remove(folder)

    def move(self, folder: Path, to: Path, seal: str) -> None:
        """Copies every object within the store, then discards the folder."""
        for name in self.sizes(folder):
            with _plain_errors(folder / name):
                self.fs.cp_file(str(folder / name), str(to / name))
        self.discard(folder, seal)

    def stage(self, folder: Path) -> Path:
        if self.direct:
            return folder
        staged = self.local(folder) / folder.name
        shutil.rmtree(staged.parent, ignore_errors=True)
        staged.parent.mkdir(parents=True)
        return staged

    def publish(self, staged: Path, folder: Path) -> None:
        if self.direct:
            return
        for path in sorted(p for p in staged.rglob("*") if p.is_file()):
            to = folder / path.relative_to(staged).as_posix()
            with _plain_errors(to):
                self.fs.put_file(str(path), str(to))
        shutil.rmtree(staged.parent, ignore_errors=True)

    # Owning.

    def lock(self, folder: Path) -> None:
        from gptjax.storage.lease import Lease  # only for a run in a bucket, as the mirror

        if str(folder) not in self._leases:
            self._leases[str(folder)] = Lease(self, folder)

    def check(self, folder: Path, now: bool = False) -> None:
        for path in (folder, *folder.parents):
            if lease := self._leases.get(str(path)):
                lease.check(now)

    def release(self, folder: Path) -> None:
        self._mirror(folder).stop()
        if lease := self._leases.pop(str(folder), None):
            lease.release()

    # Parts that must be files.

    def local(self, folder: Path) -> Path:
        return self._mirror(folder).local

    def clear(self, folder: Path) -> None:
        self._mirror(folder).clear()

    def pull(self, folder: Path, *names: str) -> None:
        self._mirror(folder).pull(*names)

    def push(self, folder: Path, *names: str) -> None:
        self._mirror(folder).push(*names)

    def keep_pushing(self, folder: Path, *names: str) -> None:
        self._mirror(folder).keep_pushing(*names)

    def _mirror(self, folder: Path) -> Any:
        from gptjax.storage.mirror import Mirror

        return self._mirrors.setdefault(str(folder), Mirror(self, folder))

    def _key(self, path: Path) -> str:
        return self.fs._strip_protocol(str(path))

    def _kind(self, path: Path) -> str:
        # Not fsspec's isfile and isdir, which return False for every error.
        try:
            with _plain_errors(path):
                return self.fs.info(str(path))["type"]
        except FileNotFoundError:
            return ""

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError), _plain_errors(path):
            self.fs.rm_file(str(path))


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Turns any error of a store's client into an OSError of one line with errno, strerror and the path."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        said = one_line(e)
        for kind, number in ((FileNotFoundError, errno.ENOENT), (FileExistsError, errno.EEXIST)):
            if isinstance(e, kind):
                raise kind(number, f"{os.strerror(number)}: {said}", str(path)) from e
        refused = isinstance(e, PermissionError) or said.startswith("Forbidden")  # as gcsfs says it
        raise StorageError(errno.EACCES if refused else errno.EIO, said, str(path)) from e

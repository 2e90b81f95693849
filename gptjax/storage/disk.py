"""Files and folders of a file system: whole files by rename, a folder away by rename, POSIX locks."""

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from gptjax.config.section import InputError

T = TypeVar("T")

TRASH, PROBE = ".trash-", ".probe-"

# This process's locks by run folder. The files stay open: closing any handle of one would release its POSIX lock.
_LOCKS: dict[Path, TextIO] = {}


def probe_in(folder: Path) -> Path:
    """A path that no other process uses, not even a container with the same host name and process ids."""
    return folder / f"{PROBE}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class StorageError(OSError, InputError):
    """A failed request to a disk or a store. The message is one line."""

    @property
    def may_pass(self) -> bool:
        """True where a retry may succeed: an outage, not a lack of permission."""
        return self.errno != errno.EACCES

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def _unless_absent(ask: Callable[[Path], T], path: Path, absent: T) -> T:
    """ask(path), or `absent` where the path leads nowhere; raises StorageError where the disk does not answer."""
    try:
        return ask(path)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return absent
        raise StorageError(e.errno, f"can't be read ({e.strerror})", str(path)) from e


def _mode(path: Path) -> int:
    return _unless_absent(lambda p: os.stat(p).st_mode, path, 0)


def this_process() -> str:
    """A process's name for the user, as it holds a run."""
    return f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"


def taken(run: Path, holder: str) -> InputError:
    """The error for a run that another process holds."""
    return InputError(f"{run} is being trained by {holder}; wait for it, stop it, or give another --run-dir")


def sync(path: Path) -> None:
    """Returns once the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Disk:
    """Files and folders of a file system; every write is synced to the disk."""

    direct = True

    def absolute(self, path: Path) -> Path:
        return path.absolute()

    def make_writable(self, folder: Path, what: str, then: str = "give another --run-dir") -> None:
        """Makes the folder and writes a file in it; raises InputError now instead of after hours of training."""
        probe = probe_in(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # another process that opens the folder removes what a killed one left
        except OSError as e:
            raise InputError(f"{folder}: {what} can't be written there ({e.strerror}); {then}") from e

    # Reading.

    def is_file(self, path: Path) -> bool:
        return stat.S_ISREG(_mode(path))

    def is_folder(self, path: Path) -> bool:
        return stat.S_ISDIR(_mode(path))

    def names(self, folder: Path) -> list[str]:
        """Names of everything in the folder, empty where there is none; another error raises StorageError."""
        return _unless_absent(os.listdir, folder, [])

    def sizes(self, folder: Path) -> dict[str, int]:
        """Size of every file below the folder, by its relative path."""
        sizes = {}
        for parent, _, names in os.walk(folder):
            for path in (Path(parent) / name for name in names):
                with contextlib.suppress(FileNotFoundError):  # just deleted by the run that owns it
                    sizes[path.relative_to(folder).as_posix()] = path.lstat().st_size
        return sizes

    def seconds(self, path: Path) -> float:
        """Time of the last write, in seconds since the epoch."""
        return path.stat().st_mtime

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def open(self, path: Path) -> contextlib.AbstractContextManager[Any]:
        return path.open("rb")

    @contextlib.contextmanager
    def readable(self, folder: Path) -> Iterator[Path]:
        """A path at which Orbax can read the folder."""
        yield folder

    # Writing.

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes, temporary: Path | None = None) -> None:
        """Writes a file whole or not at all: a temporary file, synced, then renamed."""
        temporary = temporary or path.with_name(f".{path.name}.new")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        for parent in {path.parent, temporary.parent}:
            sync(parent)

    def remove(self, path: Path) -> None:
        """Deletes a file or a folder, if it exists."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def discard(self, folder: Path, seal: str) -> None:
        """Deletes a folder so that a kill at any moment leaves it whole, or without the file `seal`."""
        # By a rename first: a kill during the delete can't leave half a folder under its name.
        trash = folder.with_name(f"{TRASH}{folder.name}-{uuid.uuid4().hex[:8]}")
        os.replace(folder, trash)
        self.remove(trash)

    def move(self, folder: Path, to: Path, seal: str) -> None:
        """Renames a folder, with the same promise."""
        os.replace(folder, to)

    def stage(self, folder: Path) -> Path:
        """The path at which Orbax writes a folder before `publish` moves it to its place."""
        return folder

    def publish(self, staged: Path, folder: Path) -> None:
        """Does nothing: it is in its place."""

    # Owning.

    def lock(self, folder: Path) -> None:
        """Locks the run until this process ends, however it ends; raises InputError where another holds it."""
        folder = folder.resolve()
        if folder in _LOCKS:
            return
        path = folder / ".lock"
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as e:
            raise InputError(f"{path}: can't be opened ({e.strerror}); remove it, or give another --run-dir") from e
        try:
            # Unlike flock's, these locks are not inherited by forked workers, which may outlive a killed trainer.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise taken(folder, holder) from e
        file.truncate(0)
        file.write(f"{this_process()}\n")
        file.flush()
        _LOCKS[folder] = file

    def check(self, folder: Path, now: bool = False) -> None:
        """Raises InputError where another process took the run over; a POSIX lock can't be."""

    def release(self, folder: Path) -> None:
        """Does nothing: the lock is held until the process ends."""

    # Parts that must be files: here, the run's own.

    def local(self, folder: Path) -> Path:
        """The folder on this machine for the parts of a run that are appended to or mapped into memory."""
        return folder

    def pull(self, folder: Path, *names: str) -> None:
        """Does nothing: there is no mirror."""

    push = keep_pushing = clear = pull

"""Files and folders of a file system: whole files by rename, a folder away by rename, POSIX locks."""

import contextlib
import fcntl
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from gptjax.config.section import InputError

TRASH, PROBE = ".trash-", ".probe-"
MARK = ".preflight-"  # a file by which processes see that they have the same folder

# Locks this process holds, by the run's folder; kept until it ends, since closing any handle of the file would
# give a POSIX lock up.
_LOCKS: dict[Path, TextIO] = {}


def probe_in(folder: Path) -> Path:
    """A file that no other process makes, containers with the same name and process numbers included."""
    return folder / f"{PROBE}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Disk:
    """Files and folders of a file system. What is written is on the disk, not only in the system's memory."""

    direct = True

    def absolute(self, path: Path) -> Path:
        return path.absolute()

    def make_writable(self, folder: Path, what: str, then: str = "give another --run-dir") -> None:
        """Makes the folder and tries a file in it; raises InputError now instead of after hours of training."""
        probe = probe_in(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # another process that opens the folder removes what a killed one left
        except OSError as e:
            raise InputError(f"{folder}: {what} can't be written there ({e.strerror}); {then}") from e

    # Reading.

    def is_file(self, path: Path) -> bool:
        return path.is_file()

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def names(self, folder: Path) -> list[str]:
        """Of everything in the folder; empty where it can't be read."""
        try:
            return os.listdir(folder)
        except OSError:
            return []

    def sizes(self, folder: Path) -> dict[str, int]:
        """Size of every file below the folder, by the path inside."""
        there = {}
        for parent, _, names in os.walk(folder):
            for path in (Path(parent) / name for name in names):
                with contextlib.suppress(FileNotFoundError):  # deleted in this moment by the run that owns it
                    there[path.relative_to(folder).as_posix()] = path.lstat().st_size
        return there

    def seconds(self, path: Path) -> float:
        """When the file was written, since the epoch."""
        return path.stat().st_mtime

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def open(self, path: Path) -> contextlib.AbstractContextManager[Any]:
        return path.open("rb")

    @contextlib.contextmanager
    def readable(self, folder: Path) -> Iterator[Path]:
        """Where Orbax can read what is in the folder."""
        yield folder

    # Writing.

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes, temporary: Path | None = None) -> None:
        """Writes a file whole or not at all: to a temporary one, to the disk, and then by a rename."""
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
            descriptor = os.open(parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Deletes a file or a folder, if it is there."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def discard(self, folder: Path, seal: str) -> None:
        """Deletes a folder so that a kill at any moment leaves it whole, or without the file `seal`."""
        # The rename takes it away whole: a kill in mid-delete can't leave half of one.
        trash = folder.with_name(f"{TRASH}{folder.name}-{uuid.uuid4().hex[:8]}")
        os.replace(folder, trash)
        self.remove(trash)

    def move(self, folder: Path, to: Path, seal: str) -> None:
        """Gives a folder another name; the same promise."""
        os.replace(folder, to)

    def stage(self, folder: Path) -> Path:
        """Where Orbax writes a folder, which `publish` then brings to its place."""
        return folder

    def publish(self, staged: Path, folder: Path) -> None:
        """Nothing: it is there."""

    # Owning.

    def lock(self, folder: Path) -> None:
        """Holds the run for this process until it ends; a dead process holds nothing, so its run can be taken over."""
        folder = folder.resolve()
        if folder in _LOCKS:
            return
        path = folder / ".lock"
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as e:
            raise InputError(f"{path}: can't be opened ({e.strerror}); remove it, or give another --run-dir") from e
        try:
            # Unlike flock's, these locks are not passed on to forked workers, which may outlive a killed trainer.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(
                f"{folder} is being trained by {holder}; wait for it, stop it, or give another --run-dir"
            ) from e
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        _LOCKS[folder] = file

    def check(self, folder: Path, now: bool = False) -> None:
        """Raises InputError where the run was lost (with `now`, as it is in this moment); these locks never are."""

    def release(self, folder: Path) -> None:
        """Nothing: the lock is the process's until it ends."""

    # What only files can hold: here, the run's own.

    def local(self, folder: Path) -> Path:
        """Where this machine keeps the parts of a run that are appended to or mapped into memory."""
        return folder

    def clear(self, folder: Path) -> None:
        """Nothing: a run begins with what its folder holds."""

    def pull(self, folder: Path, *names: str) -> None:
        """Nothing: the parts of that name are here."""

    def push(self, folder: Path, *names: str) -> None:
        """Nothing: the parts of that name are here."""

    def keep_pushing(self, folder: Path, *names: str) -> None:
        """Nothing: the parts of that name are here."""

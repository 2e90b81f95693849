"""The mirror of a run in a bucket: files on this machine that are appended to, mapped into memory, or read as files.

The bucket is authoritative. `pull` makes the files equal to it, `push` uploads files that changed as whole objects.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.runtime.versions import cache_folder

if TYPE_CHECKING:
    from gptjax.storage.bucket import Bucket

INTERVAL = 60.0  # seconds from one upload to the next
SHARE = 20  # the pause after an upload is at least this many times its duration
INDEX = ".mirror.json"
# The file of a folder (tokenizer, corpus) that is written last, and without which the folder is unfinished.
SEALS = {"tokenizer": "tokenizer_meta.json", "data/shared-tokenizer": "tokenizer_meta.json"}
SEAL = "manifest.json"


def mirror_of(folder: Path) -> Path:
    """The folder on this machine that mirrors one in a bucket."""
    return cache_folder() / "runs" / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"


class Mirror:
    """Files in mirror_of(folder) for the objects in `folder`; a name is a file or folder directly below it.

    The index holds the size, time and object version of each file that is known to be equal to its object.
    """

    def __init__(self, store: "Bucket", folder: Path):
        self._store, self._folder, self.local = store, folder, mirror_of(folder)
        self._lock = threading.Lock()  # an older upload must not overwrite a newer one
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def clear(self) -> None:
        """Deletes the files of an earlier run of the same name."""
        shutil.rmtree(self.local, ignore_errors=True)

    def pull(self, *names: str) -> None:
        """Makes the files of each name equal to the objects.

        Files whose objects are incomplete (a missing file, a folder without its seal) are left as they are.
        """
        with self._lock:
            index = self._read_index()
            for name in names:
                objects = self._objects(name)
                complete = {path: version for path, version in objects.items() if _is_complete(path, objects)}
                for path, version in complete.items():
                    if index.get(path) != [*self._state(path), version]:
                        self._store.download(self._folder / path, self.local / path)
                        index[path] = [*self._state(path), version]
                for path in self._files(name):
                    if path not in complete and _is_complete(path, objects):
                        (self.local / path).unlink(missing_ok=True)  # the processes of a host share the mirror
                self._write_index(index)

    def push(self, *names: str) -> None:
        """Uploads every changed file of each name; objects whose files were deleted stay."""
        with self._lock:
            self._store.check(self._folder, now=True)
            index = self._read_index()
            for name in names:
                sent = []
                for path in sorted(self._files(name), key=lambda p: (p == _seal(p), p)):
                    size, changed = state = self._state(path)
                    if index.get(path, [])[:2] != state:
                        with (self.local / path).open("rb") as file:
                            data = file.read(size)  # it may be growing
                        self._store.write(self._folder / path, data)
                        sent.append((path, size, changed))
                if sent:
                    objects = self._objects(name)
                    index |= {path: [size, changed, objects[path]] for path, size, changed in sent}
                    self._write_index(index)

    def keep_pushing(self, *names: str) -> None:
        """Pushes periodically in the background, until `stop`."""

        def push() -> None:
            pause = INTERVAL
            while not self._stop.wait(pause):
                start = time.monotonic()
                try:
                    self.push(*names)
                except Exception as e:  # the push of the next checkpoint must succeed, and raises
                    print(f"warning: {self._folder} was not brought up to date: {e}", file=sys.stderr, flush=True)
                pause = max(INTERVAL, SHARE * (time.monotonic() - start))

        self._stop.clear()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=push, name="upload", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _objects(self, name: str) -> dict[str, str]:
        """The version of each object of a name, by its path below the run's folder."""
        infos = self._store.infos(self._folder / name)
        return {f"{name}/{path}" if path else name: _version(info) for path, info in infos.items()}

    def _files(self, name: str) -> list[str]:
        top = self.local / name
        files = [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]
        # A leading dot marks a lock or a temporary file.
        return [path.relative_to(self.local).as_posix() for path in files if not path.name.startswith(".")]

    def _state(self, path: str) -> list[int]:
        try:
            status = (self.local / path).stat()
        except FileNotFoundError:
            return []
        return [status.st_size, status.st_mtime_ns]

    def _read_index(self) -> dict[str, list]:
        try:
            return json.loads((self.local / INDEX).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def _write_index(self, index: dict[str, list]) -> None:
        if self.local.is_dir():
            temporary = self.local / f"{INDEX}.{os.getpid()}"
            temporary.write_text(json.dumps(index))
            os.replace(temporary, self.local / INDEX)


def _seal(path: str) -> str:
    """The seal of the folder of a path."""
    folder = path.rpartition("/")[0]
    return f"{folder}/{SEALS.get(folder, SEAL)}"


def _is_complete(path: str, objects: Container[str]) -> bool:
    """True where the bucket has the whole of a path: the file itself, or a sealed folder."""
    return path in objects if "/" not in path else _seal(path) in objects


def _version(info: dict[str, Any]) -> str:
    """A value that changes whenever an object is written: its generation, hash, or time."""
    keys = ("generation", "ETag", "etag", "mtime", "created")
    return next((str(info[k]) for k in keys if info.get(k)), "")

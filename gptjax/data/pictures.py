"""The pictures of a run, each once: the original bytes in a file that is mapped, and decoded by threads when needed."""

import concurrent.futures
import mmap
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.config import VisionConfig
from gptjax.data.images import Picture, image_patches

CACHE_BYTES = 256 << 20  # of decoded patches
_THREADS = 8  # Pillow decodes without the interpreter's lock


class PictureFile:
    """Pictures by their SHA-256, each kept once. The bytes lie in a file without a name, which ends with the process.

    It is made in `folder`, or where that is not there yet in the nearest folder above it that can be written to. As
    much of what is decoded as CACHE_BYTES hold stays in memory.
    """

    def __init__(self, vision: VisionConfig, folder: Path):
        self.vision = vision
        self._folder, self._file = folder, None
        self._places: dict[str, tuple[int, int, str]] = {}  # start, bytes, origin
        self._size = 0
        self._map: mmap.mmap | None = None
        self._decoded: dict[str, np.ndarray] = {}
        self._free, self._lock = CACHE_BYTES, threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")

    def __len__(self) -> int:
        return len(self._places)

    def add(self, picture: Picture) -> None:
        """Keeps a picture, unless its bytes are there already."""
        if picture.key in self._places:
            return
        if self._file is None:
            self._file = _nameless_file(self._folder)
        self._file.write(picture.content)
        self._places[picture.key] = self._size, len(picture.content), picture.origin
        self._size += len(picture.content)

    def check(self) -> None:
        """Raises InputError, naming where it comes from, for the first picture that can't be decoded."""
        for _ in self._pool.map(self._patches, self._places):
            pass

    def patches(self, keys: Sequence[str]) -> list[np.ndarray]:
        """patches_PY uint8 of each picture, as `images.image_patches` makes them."""
        unique = list(dict.fromkeys(keys))
        made = dict(zip(unique, self._pool.map(self._patches, unique)))
        return [made[key] for key in keys]

    def _patches(self, key: str) -> np.ndarray:
        if (kept := self._decoded.get(key)) is not None:
            return kept
        start, size, origin = self._places[key]
        patches_PY = image_patches(self._content(start, size), origin, self.vision)
        with self._lock:
            if self._free >= patches_PY.nbytes and key not in self._decoded:
                self._free -= patches_PY.nbytes
                self._decoded[key] = patches_PY
        return patches_PY

    def _content(self, start: int, size: int) -> bytes:
        with self._lock:
            if self._file is None or not self._size:
                return b""
            if self._map is None or len(self._map) < self._size:
                self._file.flush()
                self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            return self._map[start : start + size]


def _nameless_file(folder: Path):
    """A file that no folder lists, as near to a folder as can be: nothing of it is left when the process is killed."""
    for place in (folder, *folder.parents):
        try:
            return tempfile.TemporaryFile(dir=place)
        except OSError:  # not there yet, or not to be written to
            continue
    return tempfile.TemporaryFile()

"""Pictures of strangers, decoded in a process of their own with little memory and little time."""

import contextlib
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.data.images import image_patches, load_decoders
from gptjax.data.worker import Worker

SECONDS = 10.0  # for one picture
MEGABYTES = 300  # of memory above what the process begins with: the largest picture that is read needs 260


class ImageReader:
    """Makes patches of pictures, one at a time, in another process: whatever happens there, this one goes on.

    The process has `megabytes` of memory (where Linux counts it) and `seconds` for a picture, and no jax. It is started
    at once, and again for the picture after one that ended it. Safe to share between threads.
    """

    def __init__(self, seconds: float = SECONDS, megabytes: int = MEGABYTES):
        self._seconds, self._megabytes = seconds, megabytes
        self._lock = threading.Lock()
        self._worker: Worker | None = self._start()

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def patches(self, content: bytes, origin: str, vision: VisionConfig) -> np.ndarray:
        """The patches of a picture: see `image_patches`.

        Raises InputError, in one line that names the origin, where that does, and where the process ends or takes too
        long.
        """
        with self._lock:
            worker = self._worker = self._worker or self._start()
            too_slow = threading.Event()
            timer = threading.Timer(self._seconds, lambda: (too_slow.set(), worker.process.kill()))
            timer.daemon = True
            timer.start()
            try:
                worker.send((content, origin, vision))
                found, result = worker.receive()
            except InputError:
                self._stop()
                how = (
                    f"takes more than {self._seconds:g} s" if too_slow.is_set() else "ends the process that decodes it"
                )
                raise InputError(f"{origin}: a picture that {how}; save it again, or smaller") from None
            finally:
                timer.cancel()
                if too_slow.is_set():  # at the last moment: the process is on its way to end
                    self._stop()
        if not found:
            raise InputError(result)
        return result

    def _start(self) -> Worker:
        return Worker("pictures", decode_pictures, self._megabytes)

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker:
            worker.__exit__()


def decode_pictures(pipe: Connection, megabytes: int) -> None:
    """The program of the process: takes (content, origin, vision), gives (True, patches) or (False, line)."""
    with contextlib.suppress(InputError):  # without Pillow: said of the first picture
        load_decoders()
    _limit_memory(megabytes)
    while True:
        content, origin, vision = pipe.recv()
        try:
            result = (True, image_patches(content, origin, vision))
        except InputError as error:
            result = (False, str(error))
        del content
        pipe.send(result)


def _limit_memory(megabytes: int) -> None:
    """Lets this process allocate so many megabytes more, where Linux counts them; elsewhere sizes alone are limited."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        import resource

        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        most = now + megabytes * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

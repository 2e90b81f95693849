"""A worker process: a function of this package in another interpreter, at the other end of a pipe."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError


class Worker:
    """A process that runs function(pipe, *args), and ends at once when this one does, however that ends.

    It answers no signal but SIGKILL, and is killed when it is closed. Unlike multiprocessing's own start methods it
    does not import the user's script, which so needs no guard. `setting` is the number of workers in an error's advice.
    """

    def __init__(self, setting: str, function: Callable[..., None], *args: Any):
        self._setting = setting
        self.pipe, theirs = Pipe()
        path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        # Libraries that encode with threads of their own: there is a process for each core already.
        env = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        program = "import sys; from gptjax.data.worker import main; main(int(sys.argv[1]))"
        command = [sys.executable, "-P", "-c", program, str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])
        theirs.close()
        self.send((function, args))

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.communicate()  # closes its input, and waits

    def send(self, message: Any) -> None:
        """Sends what the function receives; raises InputError where the process has ended."""
        try:
            self.pipe.send(message)
        except OSError:
            raise self._lost() from None

    def receive(self) -> Any:
        """The next object that the function sent; raises it where it is an exception, InputError at its end."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(message, Exception):
            raise message
        return message

    def _lost(self) -> InputError:
        code = self.process.wait()
        end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return InputError(
            f"a worker process {end} (out of memory?); run the same command again to go on, with fewer {self._setting}"
        )


def main(fd: int) -> None:
    """The worker's program."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)  # the parent answers them, and closes its workers
    threading.Thread(target=_end_with_parent, name="end with the parent", daemon=True).start()
    pipe = Connection(fd)
    with contextlib.suppress(EOFError, ConnectionError):
        function, args = pipe.recv()
        function(pipe, *args)


def _end_with_parent() -> None:
    os.read(0, 1)  # of the standard input nothing ever comes but its end
    os._exit(1)

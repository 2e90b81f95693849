"""Competitors of a benchmark as processes of their own: one works when it is asked, any others wait.

A process of its own gives each its thread pool and its memory, and lets one of them live in another Python. The child
reads one JSON value a line from its standard input and answers each with one line; what its libraries print goes to its
log. Nothing here imports jax or torch.
"""

import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A competitor ended, or did not answer in time; the message says which and shows the end of its log."""


class Competitor:
    """The parent's side: starts `command`, gives it its setting, and asks it.

    `facts` is what the child said when it was ready. Raises Failed, and kills the child, where an answer takes longer
    than `patience` seconds or is not there by `deadline`, a time of time.monotonic().
    """

    def __init__(
        self, name: str, command: list[str], setting: dict[str, Any], log: Path, env: dict, patience: float,
        deadline: float = math.inf,
    ):  # fmt: skip
        self.name, self._log, self._patience, self._deadline = name, log, patience, deadline
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env
            )
        self.facts: dict[str, Any] = self._exchange(setting)["result"]

    def ask(self, verb: str, *arguments: Any) -> dict[str, Any]:
        """What the child answers to verb(*arguments): its `result`, and the `seconds` it took by its own clock."""
        return self._exchange([verb, *arguments])

    def close(self) -> None:
        """Ends the child, at once where it does not end by itself."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _exchange(self, message: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        wait = 0.0
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
            wait = max(0.0, min(self._patience, self._deadline - time.monotonic()))
            ready, _, _ = select.select([stdout], [], [], wait)
            line = stdout.readline() if ready else None
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line)
        why = f"gave no answer in {wait:.0f} s" if line is None else "ended"
        self._process.kill()
        self._process.wait()
        tail = " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-3:])
        raise Failed(f"{self.name} {why}: {tail[-600:] or 'it wrote nothing'}")


def serve(make: Callable[[dict[str, Any]], Any], verbs: tuple[str, ...]) -> None:
    """The child's side: makes a competitor of the setting that it is given, then does as it is asked until the end.

    The competitor has `facts` and a method for each of `verbs`, which returns only when its work is done.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = do()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "result": getattr(result, "facts", result)}), file=answers, flush=True)
        return result

    setting = json.loads(sys.stdin.readline())
    competitor = answer(lambda: make(setting))
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        assert verb in verbs, verb
        answer(lambda: getattr(competitor, verb)(*arguments))  # noqa: B023 (called at once)

"""Reasons to end a run early, with everything saved: signals and the time limit."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.parallel.processes import all_reduce_max_lagged, say


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and the same command goes on."""


class Signals:
    """Signals to end: until `defer` the first one raises Interrupted; after it, `received` turns true instead.

    A second Ctrl-C ends the process at once. A second signal of a scheduler does not: schedulers signal a process and
    its parents, which pass it on, and Slurm sends its warning (SIGUSR1, with --signal) and then SIGTERM.
    """

    NAMES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self):
        self.received = self._deferred = False

    def defer(self) -> None:
        self._deferred = True

    def __call__(self, number: int, frame: Any) -> None:
        self.received = True
        for name in self.NAMES:
            signal.signal(name, signal.SIG_DFL if name == signal.SIGINT else signal.SIG_IGN)
        if not self._deferred:
            raise Interrupted


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Signals]:
    """Catches the signals with which schedulers and users end a run, for as long as the block lasts."""
    signals = Signals()
    before = {name: signal.signal(name, signals) for name in Signals.NAMES}
    try:
        yield signals
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class Stop:
    """True, in all processes at the same call, once one of them got a signal or is near its time limit.

    All must call it once a step; several processes agree one call later.
    """

    SIGNAL, NEAR = 1, 2

    def __init__(self, signals: Signals, limit: "TimeLimit"):
        self._limit = limit
        self._reason = all_reduce_max_lagged(
            lambda: self.NEAR if limit.near() else self.SIGNAL if signals.received else 0
        )

    def __call__(self) -> bool:
        reason = self._reason()
        if reason == self.NEAR:
            say(f"the time limit of {self._limit.seconds:g} s is near: saving, and ending")
        return reason > 0


class TimeLimit:
    """The moment to save, so that a run ends before `seconds` (0: never) have passed since it started.

    Call `near` once a step. Left for the end are three times the longest step so far, with the evaluations and saves
    that fell into it, twice the longest save, and MARGIN seconds. save_seconds() is how long a save took.
    """

    MARGIN = 20.0

    def __init__(self, seconds: float, started: float, save_seconds: Callable[[], float]):
        self.seconds, self._end = seconds, started + seconds if seconds else math.inf
        self._save_seconds, self._longest, self._last = save_seconds, 0.0, time.monotonic()

    def near(self) -> bool:
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        return now + 3 * self._longest + 2 * self._save_seconds() + self.MARGIN > self._end

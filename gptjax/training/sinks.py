"""Places that show a run's curves beside metrics.jsonl: TensorBoard, W&B, trackio, MLflow, a function of the user's.

Each is fed by a daemon thread of its own, so that one that blocks, raises or is full costs a training step no more than
the others: the putting of a line into a queue.
"""

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gptjax.config.plugins import resolve
from gptjax.config.section import InputError, one_line
from gptjax.training.trackers import TRACKERS

MOST_WAITING = 1000  # lines that a sink may lie behind; a line more is dropped
CLOSE_SECONDS = 10.0  # that all sinks together get at the end
QUIET_SECONDS = 1.0  # of those that pass without a word


class Sink(Protocol):
    """A place for curves and texts. All of it is called in one thread, which is neither the main one nor shared."""

    def start(self, run: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        """Begins the curves of a run, or goes on with them.

        `run` is the run's folder on this machine, where a sink may keep an id by which to go on; `settings` are all by
        their dotted names; `resumed_step` is the step restored, 0 for a new run: what comes next belongs to the steps
        after it, whatever was written for them before.
        """
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers of a step, named QUANTITY/train or QUANTITY/validation: loss/train, loss/validation, ..."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a text of a step, such as a `sample`."""
        ...

    def close(self) -> None:
        """Sends what is left. It may take CLOSE_SECONDS, after which the process goes on without it."""
        ...


def check_sinks(names: Sequence[str]) -> None:
    """Raises InputError, in one line, where the library of a sink is not installed or a function can't be imported."""
    for name in names:
        if name not in TRACKERS:
            resolve(name, "sinks")
        elif importlib.util.find_spec(TRACKERS[name].library) is None:
            raise InputError(
                f"sinks={name!r}: the package {TRACKERS[name].library} is not installed; "
                f"install it with: pip install {TRACKERS[name].install}, or leave it out of --sinks"
            )


class Sinks:
    """All sinks of a run. No method waits for one of them or raises; what goes wrong is said once by `note`."""

    def __init__(
        self, names: Sequence[str], run: Path, settings: Mapping[str, Any], step: int, note: Callable[[str], None]
    ):
        self._note = note
        self._feeds = [
            _Feed(name, TRACKERS.get(name) or resolve(name, "sinks"), (run, settings, step), note) for name in names
        ]

    def scalars(self, step: int, split: str, line: Mapping[str, Any]) -> None:
        """Gives every sink the numbers of a line of metrics.jsonl; `split` is train or validation."""
        for feed in self._feeds:
            feed.put("scalars", step, split, line)

    def text(self, step: int, name: str, text: str) -> None:
        for feed in self._feeds:
            feed.put("text", step, name, text)

    def close(self) -> None:
        """Gives the sinks CLOSE_SECONDS to write what they were given, and says what they did not."""
        start = time.monotonic()
        for feed in self._feeds:
            feed.end()
        for limit in (QUIET_SECONDS, CLOSE_SECONDS):
            for feed in self._feeds:
                feed.join(start + limit - time.monotonic())
            if limit < CLOSE_SECONDS and (late := [feed.name for feed in self._feeds if feed.running]):
                self._note(f"waiting up to {CLOSE_SECONDS:.0f} s for the sinks: {', '.join(late)}")
        for feed in self._feeds:
            feed.account()


class _Feed:
    """A sink, the thread that calls it, and the queue between that and the run."""

    def __init__(self, name: str, make: Callable[[], Sink], start: tuple, note: Callable[[str], None]):
        self.name = name
        self._make, self._start, self._note = make, start, note
        self._queue: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._given = self._dropped = self._taken = self._written = 0
        self._dead = self._told = False
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def put(self, *line: Any) -> None:
        self._given += 1
        if not self._dead and self._given - self._dropped - self._taken > MOST_WAITING:
            self._dropped += 1
            self._tell(f"is {MOST_WAITING:,} lines behind; what does not fit is left out")
        elif not self._dead:
            self._queue.put(line)

    def end(self) -> None:
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))

    def account(self) -> None:
        """Says how many lines the sink does not have."""
        if self.running:
            self._tell(f"did not end within {CLOSE_SECONDS:.0f} s")
        if lost := self._given - self._written:
            self._note(f"sink {self.name}: {lost:,} of {self._given:,} lines were not written; metrics.jsonl has all")

    def _tell(self, what: str, error: BaseException | None = None) -> None:
        if not self._told:
            self._told = True
            why = f" ({type(error).__name__}: {one_line(error)})" if error else ""
            self._note(f"sink {self.name}: {what}{why}; the run goes on without it")

    def _run(self) -> None:
        try:
            sink = self._make()
            sink.start(*self._start)
        except BaseException as e:  # libraries exit where nobody is logged in
            self._dead = True
            self._tell("can't be started", e)
            return
        while (line := self._queue.get()) is not None:
            self._taken += 1
            try:
                kind, step, name, value = line
                if kind == "text":
                    sink.text(step, name, value)
                else:
                    sink.scalars(step, scalars(name, value))
                self._written += 1
            except Exception as e:  # the next line may go through: a disk has room again, a server is back
                self._tell(f"step {line[1]} was not written", e)
        try:
            sink.close()
        except BaseException as e:
            self._tell("was not closed", e)


def scalars(split: str, line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their names in a sink; one number a layer is QUANTITY/LAYER/train."""
    values: dict[str, float] = {}
    for name, value in line.items():
        name = name.removeprefix("eval_")
        if isinstance(value, list):
            values |= {f"{name}/{i:03d}/{split}": x for i, x in enumerate(value)}
        elif isinstance(value, int | float) and name != "step":
            values[f"{name}/{split}"] = value
    return values

"""events.jsonl: starts and resumes of a run, one JSON object a line: time, step, kind and what changed."""

import json
import time
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError


def write_event(path: Path, step: int, kind: str, **more: Any) -> None:
    """Adds {"time", "step", "kind", ...} to a run's events; `step` is the last one made before."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "kind": kind, **more}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as e:
        raise InputError(f"{path}: can't be written ({e.strerror}); make room, or give another --run-dir") from e


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in order, less a torn last line; empty where there is no file."""
    events = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            events.append(json.loads(text))
        except ValueError as e:
            raise InputError(f"{path}:{number}: not valid JSON; remove the line") from e
    return events


def rows_of_step(path: Path, step: int, batch_size: int) -> tuple[int, int]:
    """The first row of a training step, counted from 1, and the rows of its batch, by the events of the run.

    A start from a step sets what follows it; where an event says nothing, batches had `batch_size` rows.
    """
    rows, after, size = 0, 0, batch_size
    for event in read_events(path):
        if event["kind"] in ("started", "resumed") and event["step"] < step:
            rows, after, size = event["rows"], event["step"], event["batch_size"]
    return rows + (step - 1 - after) * size, size

"""metrics.jsonl: one JSON object a line, written so that it reads back bit for bit."""

import contextlib
import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsFile:
    """A file of one JSON object a line, each with a `step`.

    Floats are written so that they read back bit for bit; JSON has no NaN and no infinity, so these are the strings
    "nan", "inf" and "-inf", which `read` turns back into floats.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._file = None

    def write(self, line: dict[str, Any]) -> None:
        """Adds one line and hands it to the operating system, so that a kill can't take it back."""
        values = {k: number(v) for k, v in line.items()}
        encoded = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        text = json.dumps(encoded, allow_nan=False) + "\n"
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(text)
            self._file.flush()
        except OSError as e:
            with contextlib.suppress(OSError):  # closing would try to write the same text again
                self.close()
            self._file = None
            raise InputError(
                f"{self.path}: can't be written ({e.strerror}); make room for it, or give another --run-dir"
            ) from e

    def read(self) -> list[dict[str, Any]]:
        """All lines, less a torn last one; empty where there is no file."""
        return [line for _, line in self._lines()]

    def truncate_after(self, step: int) -> int:
        """Drops the lines of later steps and a torn last line, so that a resumed run goes on where it was restored.

        Returns the last step that the file had a line of; 0 where it had none.
        """
        self.close()
        lines = list(self._lines())
        last = max((line["step"] for _, line in lines), default=0)
        kept = [(raw, line) for raw, line in lines if line["step"] <= step]
        if not self.path.is_file():
            return last
        if kept == lines[: len(kept)]:
            os.truncate(self.path, sum(len(raw) for raw, _ in kept))
        else:
            temporary = self.path.with_name(f".{self.path.name}.new")
            temporary.write_bytes(b"".join(raw for raw, _ in kept))
            os.replace(temporary, self.path)
        return last

    def best_steps(self, count: int, among: Collection[int] | None = None) -> list[int]:
        """The `count` steps of lowest evaluation loss (of those `among`), the best first; of equals the earlier."""
        lines = self._evaluations() if count else []
        losses = {line["step"]: line["eval_loss"] for line in lines if among is None or line["step"] in among}
        return sorted((s for s in losses if math.isfinite(losses[s])), key=lambda s: (losses[s], s))[:count]

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The line of the evaluation at this step; None where there is none."""
        return next((line for line in self._evaluations() if line["step"] == step), None)

    def evaluations_since_best(self) -> tuple[int, dict[str, Any]]:
        """The number of evaluations behind the one of the lowest loss, and its line; (0, {}) where there is none."""
        lines = self._evaluations()
        losses = [line["eval_loss"] if math.isfinite(line["eval_loss"]) else math.inf for line in lines]
        best = losses.index(min(losses)) if losses else 0
        return (len(lines) - 1 - best, lines[best]) if lines else (0, {})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _evaluations(self) -> list[dict[str, Any]]:
        return [line for _, line in self._lines(b'"eval_loss"') if "eval_loss" in line]

    def _lines(self, holding: bytes = b"") -> list[tuple[bytes, dict[str, Any]]]:
        """(bytes, object) of each whole line that holds `holding`; raises InputError for a broken one but the last."""
        try:
            raw_lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as e:
            raise InputError(f"{self.path}: can't be read ({e.strerror})") from e
        lines = []
        for number, raw in enumerate(raw_lines, 1):
            if holding not in raw:
                continue  # not even parsed, for a long run has a million lines and few evaluations
            try:
                line = json.loads(raw)
                whole = raw.endswith(b"\n") and isinstance(line, dict) and type(line.get("step")) is int
            except (ValueError, RecursionError):
                whole = False
            if whole:
                lines.append((raw, {k: SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in line.items()}))
            elif number < len(raw_lines):
                raise InputError(
                    f"{self.path}:{number}: no line of metrics; wanted JSON with a step, repair or remove it"
                )
        return lines


def number(value: Any) -> Any:
    """A Python number, string or None from what may be a scalar of numpy or jax."""
    return value.item() if hasattr(value, "item") else value

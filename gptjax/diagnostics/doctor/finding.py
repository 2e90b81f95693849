"""Findings of the doctor: each one line on the screen, and one entry in the JSON file."""

import dataclasses
import textwrap
from typing import Any, Literal

Level = Literal["ok", "warning", "PROBLEM"]
WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a probe. `advice` says what to do where the level is not ok; `data` holds its numbers."""

    subject: str
    level: Level
    text: str
    advice: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        start = f"{self.level:8} {self.subject:12} "
        line = start + self.text + (f"; {self.advice}" if self.advice else "")
        return textwrap.fill(line, WIDTH, subsequent_indent=" " * len(start), break_long_words=False)


def worst(findings: list[Finding]) -> Level:
    """The most severe level among the findings."""
    levels = {finding.level for finding in findings}
    return "PROBLEM" if "PROBLEM" in levels else "warning" if "warning" in levels else "ok"

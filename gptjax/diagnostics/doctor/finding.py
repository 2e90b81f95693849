"""What the doctor found: one line of the screen, one entry of the JSON."""

import dataclasses
import textwrap
from typing import Any, Literal

Level = Literal["ok", "warning", "PROBLEM"]
WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked at. `advice` says what to do, where it is not ok; `data` are its numbers."""

    subject: str
    level: Level
    text: str
    advice: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        start = f"{self.level:8} {self.subject:12} "
        line = start + self.text + (f"; {self.advice}" if self.advice else "")
        return textwrap.fill(line, WIDTH, subsequent_indent=" " * len(start), break_long_words=False)


def worst(found: list[Finding]) -> Level:
    """The gravest level among the findings."""
    levels = {finding.level for finding in found}
    return "PROBLEM" if "PROBLEM" in levels else "warning" if "warning" in levels else "ok"

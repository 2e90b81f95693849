"""Progress of a run on the screen: a bar on a terminal, and lines of history there and in a log."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from gptjax.runtime.status import status, terminal_width, wrapped, write_line

LEAST_BAR = 10  # columns: before the bar gets narrower, the MFU makes room


class ProgressBar:
    """A line of history every `every` steps and, on a terminal, a bar below it; both on stderr."""

    def __init__(self, total: int, start: int, every: int):
        self.total, self.every = total, every
        self._bar, self._text = None, ""
        if sys.stderr.isatty():
            from tqdm import tqdm

            shape = "{n_fmt}/{total_fmt} |{bar}| {desc}"
            self._bar = tqdm(total=total, initial=start, file=sys.stderr, bar_format=shape, dynamic_ncols=True)

    def step(self, line: dict[str, Any], seconds_left: float | None) -> None:
        """Shows a step: `line` has its step, loss, tokens_per_second and mfu_causal, which may be None."""
        step, rate, mfu = line["step"], line["tokens_per_second"], line.get("mfu_causal")
        parts = [f"loss {line['loss']:.4f}"]
        if rate is not None:
            parts += [f"{rate:,.0f} tokens/s"]
            parts += [] if mfu is None else [f"mfu {100 * mfu:.1f} %"]
        if seconds_left is not None:
            parts.append(f"{duration(seconds_left)} left")
        if step % self.every == 0 or step == self.total or step == 1:
            self.note(f"step {step}/{self.total}  " + "  ".join(parts))
        if self._bar is not None:
            around = len(f"{step}/{self.total} || ")
            if around + LEAST_BAR + len("  ".join(parts)) > terminal_width():
                parts = [part for part in parts if not part.startswith("mfu")]
            self._text = "  ".join(parts)
            self._bar.set_description_str(self._text, refresh=False)
            self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        text = wrapped(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            write_line(text)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Says what is being done meanwhile beside the bar, in place of the numbers."""
        with status(text, None if self._bar is None else self._bar.set_description_str):
            yield
        if self._bar is not None:
            self._bar.set_description_str(self._text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """'45s', '3m10s' or '2h05m'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"

"""Lines for the user on stderr, and a word on what is being done while nothing else is printed. Imports no jax."""

import contextlib
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

SILENT_SECONDS = 1.0  # that pass in a log before it is said what takes so long
AGAIN_SECONDS = 10.0  # that pass before it is said again, with the seconds; then twice as many, each time
TICK_SECONDS = 0.5

_lock = threading.RLock()
_on_screen = False  # a status line, without an end of line, is what the terminal shows last


def terminal_width() -> int:
    """Columns of the terminal that stderr is; 0 where it is a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stderr.isatty() else 0


def write_line(text: str) -> None:
    """Prints a line to stderr, in place of a status line if there is one."""
    with _lock:
        _erase()
        print(text, file=sys.stderr, flush=True)


def entry(label: str, text: str) -> str:
    """'label      text', wrapped at the width of the terminal, further lines below the text."""
    return wrapped(f"{label:<11}{text}", indent=11)


def wrapped(text: str, indent: int = 2) -> str:
    """The text, its lines wrapped at words where they are longer than the terminal is wide."""
    if (width := terminal_width()) < 40:
        return text
    further = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, width, **further) if len(line) > width else line for line in text.split("\n"))


@contextlib.contextmanager
def status(text: str, show: Callable[[str], None] | None = None) -> Iterator[None]:
    """Says what is being done meanwhile: on a terminal with its seconds, in a line that goes when it is done.

    A log gets a line after SILENT_SECONDS, after AGAIN_SECONDS, and whenever the time has doubled. `show` takes the
    text in place of a line of its own: a bar's.
    """
    done = threading.Event()

    def tick() -> None:
        began = time.monotonic()
        if not sys.stderr.isatty():
            due = SILENT_SECONDS
            while not done.wait(began + due - time.monotonic()):
                write_line(f"{text} ..." if due == SILENT_SECONDS else f"{text} ({due:.0f} s) ...")
                due = max(AGAIN_SECONDS, 2 * due)
            return
        while True:
            seconds = time.monotonic() - began
            (show or _show)(f"{text} ... {seconds:.0f} s" if seconds >= 1 else f"{text} ...")
            if done.wait(TICK_SECONDS):
                return

    thread = threading.Thread(target=tick, name="status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with _lock:
            _erase()


def _show(text: str) -> None:
    global _on_screen
    with _lock:
        _erase()
        print(text[: max(1, terminal_width() - 1)], end="", file=sys.stderr, flush=True)
        _on_screen = True


def _erase() -> None:
    global _on_screen
    if _on_screen:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        _on_screen = False

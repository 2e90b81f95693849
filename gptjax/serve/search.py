"""Search in a folder of text, for models: its passages are ranked by BM25 (Robertson and Zaragoza 2009)."""

import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from gptjax.config.section import InputError

SUFFIXES = (".txt", ".md", ".rst")
MOST_BYTES = 200_000_000
PASSAGE = 800  # characters after which a passage ends with its paragraph or line
K1, B = 1.5, 0.75
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


class Passage(NamedTuple):
    """A part of a file, from a line on (1 is the first)."""

    file: str
    line: int
    text: str


class Index:
    """The passages of the text files below a folder, read once, and the words in them.

    Raises InputError where the folder has no text or too much, holds a file that is no UTF-8, or a link that leads out
    of it: nothing outside of it is ever read. Hidden files are left out.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.passages: list[Passage] = []
        if not self.folder.is_dir():
            raise InputError(f"search:{folder} is no folder; wanted one with files {', '.join(SUFFIXES)}")
        self._read()
        if not self.passages:
            raise InputError(f"search:{folder} has no text in it; wanted files {', '.join(SUFFIXES)}")
        self._found: dict[str, list[tuple[int, int]]] = defaultdict(list)  # (passage, times) by word
        lengths = []
        for number, passage in enumerate(self.passages):
            counts = Counter(words(passage.text))
            lengths.append(counts.total())
            for word, times in counts.items():
                self._found[word].append((number, times))
        mean = sum(lengths) / len(lengths) or 1
        self._norms = [K1 * (1 - B + B * length / mean) for length in lengths]

    def search(self, query: str, most: int = 3) -> list[Passage]:
        """The passages that fit best, the best first; only such as hold a word of the query."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(words(query)):
            found = self._found.get(word, ())
            weight = math.log(1 + (len(self.passages) - len(found) + 0.5) / (len(found) + 0.5))
            for number, times in found:
                scores[number] += weight * times * (K1 + 1) / (times + self._norms[number])
        best = sorted(scores, key=lambda number: (-scores[number], number))[:most]
        return [self.passages[number] for number in best]

    def _read(self) -> None:
        inside, total = self.folder.resolve(), 0
        for place, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in [*folders, *sorted(files)]:
                path = Path(place) / name
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    raise InputError(f"{path} is a link out of the folder, which is not read; remove it")
                if name in folders or name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                    continue
                if not path.is_file():
                    raise InputError(f"{path} is no file; remove it")
                if (total := total + path.stat().st_size) > MOST_BYTES:
                    raise InputError(f"search:{self.folder} has more than {MOST_BYTES:,} bytes of text; wanted less")
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as e:
                    raise InputError(f"{path} can't be read as UTF-8 text ({e}); remove it or write it anew") from e
                shown = path.relative_to(self.folder).as_posix()
                self.passages += [Passage(shown, line, part) for line, part in passages(text)]


def words(text: str) -> list[str]:
    """The words of a text in lower case; a Chinese or Japanese character is one."""
    return _WORD.findall(text.lower())


def passages(text: str) -> list[tuple[int, str]]:
    """The text in parts of about PASSAGE characters, each with its first line's number; they end at paragraphs, where
    these are not too long, else at lines, or anywhere in a line that is longer."""
    parts, begin, held = [], 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        pieces = [line[i : i + 2 * PASSAGE] for i in range(0, len(line), 2 * PASSAGE)] or [""]
        for piece in pieces:
            full = len(held) >= PASSAGE and not line.strip()
            if full or len(held) + len(piece) > 2 * PASSAGE:
                parts.append((begin, held.strip("\n")))
                held = ""
            begin = number if not held.strip() else begin
            held = f"{held}\n{piece}" if held.strip() else piece
    parts.append((begin, held.strip("\n")))
    return [(line, part) for line, part in parts if part.strip()]

"""Texts laid out in rows so that what they begin with in common is computed once.

A row is a tree, or several one after the other, its tokens depth first: each text is a path from a root, and sees the
tokens of its path alone (`ops.reference.tree`). Questions share the examples in front of them, and answers their
question. Without sharing, the same rows hold the texts one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gptjax.generation.image_places import device_ids

MOST_OPEN = 64  # rows that are tried for a text before a new one is begun


class Path(NamedTuple):
    """A text to score: all of its ids, the first `given` of which are only read; `owner` is the caller's number."""

    owner: int
    ids: Sequence[int]
    given: int

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.ids) - 1

    @property
    def num_scored(self) -> int:
        """Tokens that the model predicts: all that are not given."""
        return len(self.ids) - self.given


@dataclass
class Row:
    """The tokens of one row and, for every token to predict, the place whose output predicts it."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    until: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    """In the order of their targets."""
    trail: list[int] = field(default_factory=list)
    """The place of each token of the last path."""

    def common(self, path: Path) -> int:
        """Tokens that a path could share with the last one."""
        return common(self.paths[-1], path) if self.paths else 0

    def add(self, path: Path, shared: int) -> None:
        """Lays out a path behind the others, of whose last one it shares so many tokens."""
        self._leave(shared)
        for position in range(shared, path.num_inputs):
            self.trail.append(len(self.tokens))
            self.tokens.append(path.ids[position])
            self.positions.append(position)
            self.segments.append(len(self.paths) + 1)
            self.until.append(0)
        for position in range(path.given - 1, path.num_inputs):
            self.places.append(self.trail[position])
            self.targets.append(path.ids[position + 1])
        self.paths.append(path)

    def _leave(self, shared: int) -> None:
        for place in self.trail[shared:]:
            self.until[place] = len(self.tokens)
        del self.trail[shared:]

    def filled(self, length: int) -> dict[str, np.ndarray]:
        """The arrays of the row, filled up to a length; what fills it is seen by nothing but itself."""
        self._leave(0)
        fillers = {"tokens": 0, "positions": 0, "segments": 0, "until": length, "places": 0, "targets": 0}
        arrays = {name: np.full(length, filler, np.int32) for name, filler in fillers.items()}
        for name, array in arrays.items():
            array[: len(getattr(self, name))] = device_ids(self.tokens) if name == "tokens" else getattr(self, name)
        return arrays


def common(a: Path, b: Path) -> int:
    """Tokens that the model reads first of both texts."""
    most = min(a.num_inputs, b.num_inputs)
    return next((i for i in range(most) if a.ids[i] != b.ids[i]), most)


def lay_out(groups: Sequence[Sequence[Path]], length: int, share: bool, alone: bool = False) -> list[Row]:
    """Rows of at most `length` tokens, and as many targets, that hold the texts; a group stays in a row where it fits.

    It goes where it adds the fewest tokens, of such rows to the fullest. With `alone` each text has a row of its own.
    """
    rows: list[Row] = []

    def place(paths: Sequence[Path]) -> bool:
        """Puts paths into a row, a new one if they fit in none; False where they are too many for any."""
        inside = [0, *(common(a, b) if share else 0 for a, b in zip(paths, paths[1:]))]
        size, scored = sum(p.num_inputs for p in paths) - sum(inside), sum(p.num_scored for p in paths)
        if size > length or scored > length:
            return False
        best: tuple[int, int, int] | None = None
        for number in range(max(0, len(rows) - MOST_OPEN), 0 if alone else len(rows)):
            row = rows[number]
            grows = size - (row.common(paths[0]) if share else 0)
            free = length - len(row.tokens) - grows
            if free >= 0 and len(row.targets) + scored <= length and (best is None or (grows, free) < best[:2]):
                best = grows, free, number
        if best is None:
            rows.append(Row())
        row = rows[best[2] if best else -1]
        for path in paths:
            row.add(path, row.common(path) if share else 0)
        return True

    ordered = sorted(groups, key=lambda paths: list(paths[0].ids)) if share else groups
    for group in ordered:
        paths = sorted(group, key=lambda path: list(path.ids)) if share else group
        if not (share and place(paths)):
            for path in paths:
                assert place([path]), "a row is as long as its longest text"
    return rows

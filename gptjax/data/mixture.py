"""Rows of several sources in fixed proportions: which source a row belongs to is a pure function of its number."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from gptjax.config import DataConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, RowSampler, RowSlice, TokenSplit, mixed_key, numbers_of, row_numbers, separate
from gptjax.data.packing import Batch

_MOST_ROWS = 1 << 30  # of a pass; products of two such numbers still fit into 64 bits


def parse_sources(entries: Sequence[str]) -> dict[str, str]:
    """NAME=SOURCE entries as {name: source}, in their order."""
    return {name: source for name, _, source in (entry.partition("=") for entry in entries)}


class SourceSchedule:
    """Gives row r of the mixture to a source, and says which of that source's rows it is.

    A pass has counts[i] rows of source i, evenly spread: the largest source takes every row at which
    round(r counts / total) rises, the next one does so among the rows that are left, and so on. Every whole pass has
    exactly counts[i] rows of source i, and any first r rows differ from r counts[i] / total by at most
    (1 + 1 + 1/2 + ... + 1/(k-2)) / 2 rows for k sources: half a row for two, one for three, less than two for eleven.
    """

    def __init__(self, counts: Sequence[int]):
        assert min(counts) > 0 and sum(counts) <= _MOST_ROWS, counts
        self.counts, self.total = list(counts), sum(counts)
        self._order = sorted(range(len(counts)), key=lambda i: -counts[i])

    def split(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and the row's number among that source's rows; both int64."""
        passes, rest = np.divmod(number, self.total)
        source, index = np.full_like(number, -1), np.zeros_like(number)
        left = self.total
        for i in self._order:
            count = self.counts[i]
            before, after = ((2 * count * r + left) // (2 * left) for r in (rest, rest + 1))
            mine = (source < 0) & (after > before)
            source[mine] = i
            index[mine] = passes[mine] * count + before[mine]
            rest = rest - before
            left -= count
        return source, index

    def before(self, number: int) -> list[int]:
        """How many of the rows before this one belong to each source."""
        passes, rest = divmod(number, self.total)
        counted, left = [passes * count for count in self.counts], self.total
        for i in self._order:
            taken = (2 * self.counts[i] * rest + left) // (2 * left)
            counted[i] += taken
            rest, left = rest - taken, left - self.counts[i]
        return counted


class Mixture:
    """The rows of several splits, each visited in its own order and epochs as `RowSampler` does it."""

    def __init__(self, splits: dict[str, TokenSplit], cfg: DataConfig, seed: int):
        self.cfg, self.names = cfg, list(splits)
        self.rows: list[RowSampler] = []
        for number, (name, split) in enumerate(splits.items()):
            try:
                # One unnamed source is no mixture: its rows are those of its own seed.
                self.rows.append(RowSampler(split, cfg, mixed_key(seed, number) if name else seed))
            except InputError as error:
                raise InputError(f"{name}: {error}" if name else str(error)) from None
        self.schedule = SourceSchedule(rows_of_a_pass(cfg, [(r.rows_per_epoch, r.split.num_tokens) for r in self.rows]))

    def batch(self, step: int, rows: RowSlice = ALL_ROWS) -> Batch:
        """The batch that is trained on after `step` steps, or some rows of it."""
        return self._rows(row_numbers(self.cfg, step, rows))

    def several(self, steps: range, rows: RowSlice = ALL_ROWS) -> list[Batch]:
        """The batches of these steps, cut at once."""
        return separate(self._rows(numbers_of(self.cfg, steps, rows)), len(steps))

    def _rows(self, number: np.ndarray) -> Batch:
        source_B, index_B = self.schedule.split(number)
        counts = np.bincount(source_B).tolist()
        parts = {i: self.rows[i].rows(index_B[source_B == i]) for i, count in enumerate(counts) if count}
        return joined(source_B, parts)

    def targets(self, step: int) -> list[int]:
        """How many targets with weight the whole batch after `step` steps has of each source; no token is read."""
        source_B, index_B = self.split(step)
        numbers = [index_B[source_B == i] for i in range(len(self.rows))]
        return [int(rows.targets(mine).sum()) if len(mine) else 0 for rows, mine in zip(self.rows, numbers)]

    def split(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of the source of each row of a batch, and the row's number in that source."""
        return self.schedule.split(row_numbers(self.cfg, step))

    def passes(self, steps: int) -> dict[str, float]:
        """How often each source has been passed after some steps."""
        seen = self.schedule.before(steps * self.cfg.batch_size)
        return {name: count / rows.rows_per_epoch for name, count, rows in zip(self.names, seen, self.rows)}


def rows_of_a_pass(cfg: DataConfig, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """How many rows of each source a pass over the mixture has, from each one's (rows, tokens) of an epoch.

    Weights are epochs (1 each where none are given), or shares of the tokens.
    """
    weights = [Fraction(w) for w in cfg.weights or [1.0] * len(sizes)]
    rows = [w * r for w, (r, _) in zip(weights, sizes)]
    if cfg.weights and cfg.weights_are == "shares":
        shares = [w * r / t for w, (r, t) in zip(weights, sizes)]
        rows = [s * _MOST_ROWS / 2 / sum(shares) for s in shares]
    scale = min(Fraction(1), Fraction(_MOST_ROWS - len(sizes)) / sum(rows))
    return [max(1, int(r * scale + Fraction(1, 2))) for r in rows]


def joined(source_B: np.ndarray, parts: dict[int, Batch]) -> Batch:
    """One batch of the rows of several, which `source_B` lists in their order."""
    first = next(iter(parts.values()))
    if len(parts) == 1:
        return first
    out = {name: np.empty((len(source_B), *value.shape[1:]), value.dtype) for name, value in first.items()}
    for i, part in parts.items():
        for name, value in part.items():
            out[name][source_B == i] = value
    return out

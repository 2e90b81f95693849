"""Rows of several sources in fixed proportions: the source of a row is a pure function of the row's number.

A single source, whose name is empty, is a mixture of one.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from gptjax.config import DataConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, RowSampler, RowSlice, TokenSplit, row_numbers
from gptjax.data.packing import Batch
from gptjax.data.permutation import mix_integers

_MAX_ROWS = 1 << 30  # of a pass; products of two such numbers still fit into 64 bits


class SourceSchedule:
    """Assigns each row of a mixture to a source, and to one of that source's rows.

    A pass has counts[i] rows of source i, evenly spread: the largest source takes every row at which
    round(r counts / total) rises, the next one does so among the rows that are left, and so on. Every whole pass has
    exactly counts[i] rows of source i, and any first r rows differ from r counts[i] / total by at most
    (1 + 1 + 1/2 + ... + 1/(k-2)) / 2 rows for k sources: half a row for two, one for three, less than two for eleven.
    """

    def __init__(self, counts: Sequence[int]):
        assert min(counts) > 0 and sum(counts) <= _MAX_ROWS, counts
        self.counts, self.total = list(counts), sum(counts)
        self._order = sorted(range(len(counts)), key=lambda i: -counts[i])

    def assign(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and the row's number among that source's rows; both int64."""
        passes, rest = np.divmod(number, self.total)
        source, index = np.full_like(number, -1), np.zeros_like(number)
        left = self.total
        for i in self._order:
            count = self.counts[i]
            before, after = ((2 * count * r + left) // (2 * left) for r in (rest, rest + 1))
            own = (source < 0) & (after > before)
            source[own] = i
            index[own] = passes[own] * count + before[own]
            rest = rest - before
            left -= count
        return source, index


class Mixture:
    """The rows of several splits, each visited in its own order and epochs by a `RowSampler`."""

    def __init__(self, splits: dict[str, TokenSplit], cfg: DataConfig, seed: int):
        self.cfg = cfg
        self.samplers: list[RowSampler] = []
        for number, (name, split) in enumerate(splits.items()):
            try:
                # A single source has the run's own seed: its rows are those of its sampler alone.
                self.samplers.append(RowSampler(split, cfg, mix_integers(seed, number) if name else seed))
            except InputError as error:
                raise InputError(f"{name}: {error}".removeprefix(": ")) from None
        sizes = [(sampler.rows_per_epoch, sampler.split.num_tokens) for sampler in self.samplers]
        self.schedule = SourceSchedule(rows_of_a_pass(cfg, sizes))

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The batch that begins with row `first`, or some rows of it."""
        return self.rows(row_numbers(self.cfg, first, part))

    def rows(self, number: np.ndarray) -> Batch:
        """The rows with these numbers (int64, rising) as a batch."""
        source_B, index_B = self.schedule.assign(number)
        counts = np.bincount(source_B).tolist()
        parts = {i: self.samplers[i].rows(index_B[source_B == i]) for i, count in enumerate(counts) if count}
        return join_rows(source_B, parts)

    def num_targets(self, first: int) -> list[int]:
        """Targets with weight of each source in the whole batch from row `first` on; no token is read."""
        source_B, index_B = self.assign(first)
        numbers = [index_B[source_B == i] for i in range(len(self.samplers))]
        return [rows.num_targets(own) if len(own) else 0 for rows, own in zip(self.samplers, numbers)]

    def assign(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """The index of the source of each row of a batch, and the row's number in that source."""
        return self.schedule.assign(row_numbers(self.cfg, first))


def rows_of_a_pass(cfg: DataConfig, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Rows of each source in a pass over the mixture, from each one's (rows, tokens) of an epoch.

    Weights are epochs (1 each where none are given), or shares of the tokens.
    """
    weights = [Fraction(w) for w in cfg.weights or [1.0] * len(sizes)]
    rows = [w * r for w, (r, _) in zip(weights, sizes)]
    if cfg.weights and cfg.weights_are == "shares":
        shares = [w * r / t for w, (r, t) in zip(weights, sizes)]
        rows = [s * _MAX_ROWS / 2 / sum(shares) for s in shares]
    scale = min(Fraction(1), Fraction(_MAX_ROWS - len(sizes)) / sum(rows))
    return [max(1, int(r * scale + Fraction(1, 2))) for r in rows]


def join_rows(source_B: np.ndarray, parts: dict[int, Batch]) -> Batch:
    """One batch of the rows of several sources, which `source_B` lists in their order."""
    first = next(iter(parts.values()))
    if len(parts) == 1:
        return first
    out = {name: np.empty((len(source_B), *value.shape[1:]), value.dtype) for name, value in first.items()}
    for i, part in parts.items():
        for name, value in part.items():
            out[name][source_B == i] = value
    return out

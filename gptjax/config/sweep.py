"""Settings of `gptjax sweep`."""

import math
from dataclasses import dataclass

from gptjax.config.section import InputError, Section

# Settings of its runs that the sweep sets itself.
OWN = ("run_dir", "steps", "seed", "checkpoint.at", "checkpoint.keep_newest", "checkpoint.keep_every", "evaluate.every",
       "sinks", "sample")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Section):
    """Train a recipe at many sizes for many budgets of compute; a long run serves all shorter horizons of its size."""

    out: str = "runs/sweep"
    """Folder of the sweep: jobs.jsonl, runs/, logs/ and table.csv. The same command, run from the same folder,
    resumes it. Don't move it before all is trained: its jobs name their text by path."""
    grid: tuple[str, ...] = ()
    """Points, as BUDGET:SIZE,SIZE,... with BUDGET in training FLOPs (1e15:4,6,8), and @SEED,SEED,... after it for
    other seeds than the recipe's. A larger grid adds points to a sweep; points are never removed."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change at every size, as NAME=VALUE (data.source=corpus optim.beta2=0.98); several
    values are separated by spaces, and quoted as in a shell. A job keeps the settings that it was added with."""
    workers: int = 1
    """Jobs that run at a time, each on its share of the cores; 1 on a GPU or TPU, which every job takes whole. The last
    bits of a loss may depend on it."""

    def __post_init__(self):
        self.require(bool(self.out) and "://" not in self.out, "out", "a folder of a file system, for its locks")
        self.require_positive("workers")
        for entry in self.set:
            name, equals, _ = entry.partition("=")
            self.require(bool(name and equals), "set", f"NAME=VALUE entries, not {entry!r}")
            own = name.replace("-", "_") in OWN
            self.require(not own, "set", f"no {name}, which the sweep sets itself", "--grid gives steps and seeds")
        _ = self.points

    @property
    def points(self) -> tuple[tuple[float, str, int | None], ...]:
        """(budget, size, seed) of each point; None is the recipe's seed."""
        return tuple(point for entry in self.grid for point in _points(entry))


def _points(entry: str) -> list[tuple[float, str, int | None]]:
    """The points of one entry of the grid; raises InputError for another form."""
    front, at, seeds = entry.partition("@")
    budget, colon, sizes = front.partition(":")
    try:
        flops = float(budget)
        numbers = [int(seed) for seed in seeds.split(",")] if at else [None]
    except ValueError:
        flops, numbers = 0.0, []
    if not (colon and math.isfinite(flops) and flops > 0 and numbers and all(sizes.split(","))):
        raise InputError(
            f"grid={entry!r}: wanted BUDGET:SIZE,SIZE,... or BUDGET:SIZE,...@SEED,...; e.g. 1e15:4,6,8@0,1"
        )
    return [(flops, size, seed) for size in sizes.split(",") for seed in numbers]

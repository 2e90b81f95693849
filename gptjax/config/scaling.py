"""Settings of `gptjax fit` and `gptjax predict`."""

import math
from dataclasses import dataclass
from typing import Literal

from gptjax.config.section import Section


@dataclass(frozen=True, kw_only=True)
class FitConfig(Section):
    """Fit a scaling law to a table of finished runs, with intervals, and write a report."""

    out: str = "fit"
    """Folder for fit.json, report.html and the plots."""
    law: Literal["chinchilla", "overtraining", "kaplan", "data_constrained"] = "chinchilla"
    """Law of the loss: chinchilla, E + A/N^alpha + B/D^beta (Hoffmann et al. 2022); overtraining, the same with one
    exponent, by least squares (Gadre et al. 2024): from 4 points on; kaplan, with no floor E (Kaplan et al. 2020);
    data_constrained, chinchilla's where tokens repeat (Muennighoff et al. 2023), by a column of unique_tokens,
    runs of one epoch and runs of several."""
    approach: Literal["all", "envelope", "isoflop", "parametric"] = "all"
    """Approach of Hoffmann et al. 2022 to the optimal N and D: all that the table allows, or this one."""
    columns: tuple[str, ...] = ()
    """Columns with other names, as FIELD=COLUMN: loss=loss__c4 parameters=size."""
    where: tuple[str, ...] = ()
    """Points to use, by conditions that must all hold: dataset=rpj,c4 tokens>=1e9 (=, !=, <, <=, >, >=)."""
    max_flops: float = 0.0
    """Leave out points whose budget (or FLOPs) is above this, in order to predict them; 0: use all."""
    count: Literal["total", "non-embedding"] = "total"
    """Parameters that N counts; Kaplan et al. count non-embedding ones."""
    flops_per: float = 6.0
    """FLOPs for each parameter and token, for tables without a column of FLOPs or of tokens: C = 6 N D."""
    delta: float = 1e-3
    """Width at which the Huber loss on log loss turns from squares to absolute values; unused by overtraining."""
    bootstraps: int = 1000
    """Resampled tables behind each interval; 0: no intervals."""
    level: float = 0.95
    """Share of the resampled fits that an interval holds."""
    seed: int = 0
    """Seed of the resampling."""

    def __post_init__(self):
        self.require(bool(self.out), "out", "a folder")
        self.require_positive("flops_per", "delta")
        self.require_numbers(0, math.inf, "max_flops")
        self.require_numbers(0, 100_000, "bootstraps")
        self.require(self.bootstraps == 0 or self.bootstraps >= 20, "bootstraps", "0, or at least 20 for an interval")
        self.require_numbers(0, 2**32 - 1, "seed")
        self.require(0 < self.level < 1, "level", "above 0 and below 1", "e.g. 0.95")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Section):
    """Predict with a fit: the optimal run for a budget, the loss of a run, or the losses of a table."""

    flops: float = 0.0
    """A budget, to find its optimal parameters and tokens and their loss."""
    parameters: float = 0.0
    """Parameters of a run whose loss to predict; with --tokens."""
    tokens: float = 0.0
    """Training tokens of that run."""
    unique_tokens: float = 0.0
    """Unique tokens in the data, for a fit of data_constrained; 0: all trained tokens are unique."""
    against: str = ""
    """A table of runs to predict, and to compare where it has losses; without losses, runs that are planned."""
    columns: tuple[str, ...] = ()
    """Columns of that table with other names, as FIELD=COLUMN; those of the fit do not apply."""
    where: tuple[str, ...] = ()
    """Rows of that table to compare: flops>1e18."""
    recipe: Literal["steplaw", "deepseek", "kaplan"] = "steplaw"
    """Published rule that recommends a batch size and a learning rate."""
    extrapolate: bool = False
    """Allow predictions more than a decade beyond the fitted points."""
    json: str = ""
    """File for the predictions."""

    def __post_init__(self):
        self.require_numbers(0, math.inf, "flops", "parameters", "tokens", "unique_tokens")
        run, asked = self.parameters > 0 or self.tokens > 0, (self.flops > 0) + bool(self.against)
        if run:
            self.require(self.parameters > 0, "parameters", "the parameters of the run, beside --tokens")
            self.require(self.tokens > 0, "tokens", "the tokens of the run, beside --parameters")
        alone = not (self.unique_tokens and self.against)
        self.require(alone, "unique_tokens", "0 with --against, whose table has a column of them")
        self.require(asked + run < 2, "flops", "one of --flops, --parameters with --tokens, and --against")

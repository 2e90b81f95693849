"""What `gptjax fit` does: a table, a law with intervals, the three approaches, and a folder that tells of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gptjax.config import FitConfig, TrainConfig
from gptjax.scaling.table import Table, read_table
from gptjax.settings import InputError

# What a law is fitted with at the least: its free parameters, and different values of N and of D to tell them apart.
NEEDS = {"chinchilla": (5, 3, 3), "overtraining": (4, 3, 3)}


def fit(
    tables: Sequence[str],
    cfg: FitConfig,
    load_config: Callable[[Path], TrainConfig],
    show: Callable[[str], None],
    say: Callable[[str], None],
) -> str:
    """Fits a law to the runs of a table and writes cfg.out; returns the next command to try.

    One screen goes to `show`, what was written where to `say`. Raises InputError for a table that is wrong or small.
    """
    table = points(tables, cfg, load_config)
    check_enough(table, cfg.law)
    return ""


def points(tables: Sequence[str], cfg: FitConfig, load_config: Callable[[Path], TrainConfig]) -> Table:
    """The points of a table that the settings let into the fit."""
    table = read_table(
        tables,
        columns=cfg.columns,
        where=cfg.where,
        count=cfg.count,
        flops_per=cfg.flops_per,
        load_config=load_config,
    )
    if not cfg.max_flops:
        return table
    kept = table.up_to(cfg.max_flops)
    if not len(kept):
        least = np.fmin(table.flops, table.budget).min()
        raise InputError(
            f"max_flops={cfg.max_flops:g}: all {len(table)} points of {table.source} are above; the smallest has "
            f"{least:.3g} FLOPs, give more"
        )
    return kept


def check_enough(table: Table, law: str) -> None:
    """Raises InputError where the points can't determine the law, whatever they are."""
    free, sizes, horizons = NEEDS[law]
    if len(table) < free:
        raise InputError(
            f"{table.source}: {len(table)} point(s) for the {free} parameters of {law}; wanted at least {free}, better "
            "3 times as many: add runs, or widen --where or --max-flops"
        )
    if np.ptp(np.log(table.flops)) < np.log(1.5):
        raise InputError(
            f"{table.source}: all {len(table)} points have about {np.median(table.flops):.3g} FLOPs, one budget; "
            "wanted at least 2 budgets, better 5 over a decade or more: add runs"
        )
    for what, values, least in (("sizes", table.parameters, sizes), ("token counts", table.tokens, horizons)):
        there = len(np.unique(np.round(np.log(values), 3)))
        if there < least:
            raise InputError(
                f"{table.source}: {there} different {what}; {law} wanted at least {least} to tell its exponents apart: "
                "add runs"
            )

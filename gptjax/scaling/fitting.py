"""`gptjax fit`: fits a law with intervals and the three approaches to a table, and writes a report."""

import contextlib
import dataclasses
import functools
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.config.scaling import FitConfig
from gptjax.config.section import InputError
from gptjax.runtime.status import status
from gptjax.runtime.versions import version
from gptjax.scaling import report
from gptjax.scaling.approaches import ASSUMES, Allocation, envelope, isoflop, leave_one_budget_out, parametric
from gptjax.scaling.families import FAMILIES
from gptjax.scaling.fits import Fitted, fit_law
from gptjax.scaling.laws import TwoPoint
from gptjax.scaling.saved import FORMAT, Fit, interval, strict
from gptjax.scaling.table import INPUTS, Table, read_table
from gptjax.storage import filesystem, resolve_path

BAND = 24  # budgets at which the interval of N-opt and D-opt is recorded
MOST_NOTES = 12
LEAST = 3  # different sizes, and token counts, that separate a law's terms


def fit_table(
    tables: Sequence[str], cfg: FitConfig, show: Callable[[str], None], say: Callable[[str], None]
) -> list[str]:
    """Fits a law to the runs of a table and writes cfg.out; returns the words of the next command.

    One screen goes to `show`, the written paths to `say`. Raises InputError for a table that is wrong or too small.
    """
    table, left_out = points(tables, cfg)
    check_enough(table, cfg.law)
    if filesystem(resolve_path(cfg.out)).is_file(resolve_path(cfg.out)):
        raise InputError(f"out={cfg.out!r}: there is a file of that name; wanted a folder")
    with _progress() as doing:
        result = Fit(strict(fit_document(table, cfg, left_out, doing)), source=f"{cfg.out}/fit.json")
        doing("drawing the report")
        written = report.write_report(result, resolve_path(cfg.out))
    for line in report.screen(result):
        show(line)
    say(f"wrote {', '.join(f'{cfg.out}/{name}' for name in written)}")
    if left_out and len(tables) == 1:
        filters = ["--where", *cfg.where] if cfg.where else []
        columns = ["--columns", *cfg.columns] if cfg.columns else []
        return ["predict", cfg.out, "--against", tables[0], *filters, *columns]
    return ["predict", cfg.out, "--flops", f"{3 * result.document['range']['flops'][1]:.2g}"]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that says on a terminal what is being done, until it is called again."""
    with contextlib.ExitStack() as shown:

        def doing(what: str) -> None:
            shown.close()
            shown.enter_context(status(what))

        yield doing if sys.stderr.isatty() else lambda what: None


def fit_document(
    table: Table, cfg: FitConfig, left_out: int, doing: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Fits the law and the approaches; returns the document of fit.json (saved.KEYS). `doing` hears of each step."""
    family = FAMILIES[cfg.law]
    inputs, loss = table.inputs(family.inputs), table.loss
    per = float(np.median(table.flops / (table.parameters * table.tokens)))
    fit = functools.partial(fit_law, family, delta=cfg.delta)

    @functools.cache
    def fit_all() -> Fitted:
        doing(f"fitting {cfg.law} with {cfg.bootstraps:,} resamples")
        try:
            return fit(*inputs, loss, bootstraps=cfg.bootstraps, seed=cfg.seed, level=cfg.level)
        except InputError as e:
            raise InputError(f"{table.source}: --law {cfg.law}: {e}") from e

    ways = approaches(table, fit_all, per, cfg, doing)  # before the law, which takes longer: may raise
    fitted = fit_all()
    predicted = fitted.law.loss(*inputs)
    off = loss / predicted - 1
    fields = [INPUTS[name] for name in family.inputs]
    notes = [*table.notes, *fitted.notes]
    if repeated := int(np.sum(~table.new)):
        notes.append(
            f"optimal N and D and the plots' curves are for unique tokens, without the {repeated} runs that repeat "
            "theirs; gptjax predict --unique-tokens U accounts for repetition"
        )
    if left_out:
        notes.append(f"--max-flops {cfg.max_flops:g} left out {left_out} points")
    return {
        "format": FORMAT,
        "law": cfg.law,
        "formula": family.formula,
        "coefficients": {k: {"value": v, "interval": interval(fitted.interval(k))}
                         for k, v in fitted.coefficients.items()},
        "residuals": {"rms": float(np.sqrt(np.mean(off**2))), "largest": float(np.abs(off).max())},
        "flops_per": per,
        "level": cfg.level,
        "range": {k: [getattr(table, k).min(), getattr(table, k).max()] for k in (*fields, "flops")},
        "approaches": ways,
        "leave_one_out": leave_out(table, fit, inputs, doing),
        "baseline": _baseline(table),
        "points": {"name": table.names, "seed": table.seeds, **dict(zip(fields, inputs)), "flops": table.flops,
                   "budget": table.budget, "loss": loss, "predicted": predicted},
        "table": {"source": table.source, "sha256": table.sha256, "points": len(table), "left_out": left_out},
        "settings": dataclasses.asdict(cfg),
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in ("gptjax", "jax", "numpy")}},
        "notes": notes,
        "fitted": fitted.record(),
    }  # fmt: skip


def approaches(
    table: Table, fit_all: Callable[[], Fitted], flops_per: float, cfg: FitConfig,
    doing: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """Each approach as JSON: done or the reason why not, exponents and coefficients of N-opt and D-opt, intervals.

    `fit_all` returns the fitted law, for the parametric approach. Raises InputError where the approach that
    cfg.approach names can't be done.
    """
    again = {"bootstraps": cfg.bootstraps, "seed": cfg.seed, "level": cfg.level}
    of = np.isfinite(table.budget) & table.new
    columns = (table.budget[of], table.parameters[of], table.tokens[of], table.loss[of])

    def by_envelope() -> Allocation:
        curves, whole, source = curves_of(table.keep(table.new))
        allocation = envelope(curves, flops_per=flops_per, whole=whole, **again)
        return dataclasses.replace(allocation, notes=(f"curves: {source}", *allocation.notes))

    def by_isoflop() -> Allocation:
        if not of.any():
            raise InputError("the table has no budgets; wanted a column of budgets, or 3 points at each of some FLOPs")
        return isoflop(*columns, **again)

    def by_law() -> Allocation:
        if why := FAMILIES[cfg.law].no_powers:
            raise InputError(why)
        return parametric(fit_all(), flops_per)

    results: dict[str, Any] = {}
    for name, make in (("envelope", by_envelope), ("isoflop", by_isoflop), ("parametric", by_law)):
        if cfg.approach not in ("all", name):
            results[name] = {"done": False, "why": f"not asked for (--approach {cfg.approach})"}
            continue
        doing(f"approach: {name}")
        try:
            results[name] = _allocation(make(), table.flops)
        except InputError as e:
            if cfg.approach == name:
                raise InputError(f"{table.source}: --approach {name}: {e}") from e
            results[name] = {"done": False, "why": str(e)}
    return results


def curves_of(table: Table) -> tuple[list[tuple[float, np.ndarray, np.ndarray]], bool, str]:
    """(N, tokens [T], loss [T]) of curves for the envelope, whether each is one run, and their description.

    In order of preference: evaluations along the runs; finished runs of one size at several token counts, each with its
    cooldown; training losses, which at the peak learning rate lie above those after a
    cooldown. Raises InputError where there are none.
    """
    runs = [(float(n), c.tokens_T, c.loss_T) for n, c in zip(table.parameters, table.curves) if c is not None]
    if runs and table.evaluated:
        return runs, True, f"the evaluations along {len(runs)} runs"
    finished = []
    for size in np.unique(table.parameters):
        of = table.parameters == size
        tokens = np.unique(table.tokens[of])
        if len(tokens) >= 2:
            losses = np.array([table.loss[of & (table.tokens == t)].mean() for t in tokens])
            finished.append((float(size), tokens, losses))
    if len(finished) >= 3:
        return finished, False, f"through the finished runs of each of {len(finished)} sizes, at several token counts"
    if runs:
        return runs, True, f"the training losses along {len(runs)} runs, which end above what a cooldown would reach"
    raise InputError(
        "no training curves; wanted run folders, a sweep with its run_dirs there, or 3 sizes with several token counts"
    )


def _allocation(allocation: Allocation, flops: np.ndarray) -> dict[str, Any]:
    over = np.geomspace(flops.min(), 10 * flops.max(), BAND)
    best = [allocation.optimal(float(c)) for c in over]
    band = {k: [[b[k][i] for b in best] for i in (1, 2)] for k in "ND"}
    least_losses = allocation.loss_law
    return {
        "done": True,
        "why": "",
        "coefficients": {"N": allocation.k_N, "D": allocation.k_D},
        "exponents": {"N": allocation.a, "D": allocation.b},
        "intervals": {"N": interval(allocation.interval("a")), "D": interval(allocation.interval("b"))},
        "band": {"flops": over} | band if allocation.samples else None,
        "least_loss": least_losses.coefficients if least_losses and allocation.approach != "parametric" else None,
        "minima": [{"budget": c, "N": dataclasses.asdict(n), "D": dataclasses.asdict(d)}
                   for c, (n, d) in allocation.minima.items()],
        "assumes": ASSUMES[allocation.approach],
        "notes": _short(allocation.notes),
    }  # fmt: skip


def leave_out(
    table: Table, fit: Callable[..., Fitted], inputs: Sequence[np.ndarray], doing: Callable[[str], None]
) -> dict[str, Any]:
    """Errors of a law fitted without each budget on its runs, or the reason why there are none."""
    if len(table.budgets) < 2:
        return {"done": False, "why": f"{len(table.budgets)} budget(s) in the table, wanted at least 2"}

    def fit_others(*columns: np.ndarray) -> Fitted:
        doing(f"leaving each of {len(table.budgets)} budgets out")
        return fit(*columns)

    rows = leave_one_budget_out(fit_others, table.budget, *inputs, table.loss)
    if all(np.isnan(row["error"]) for row in rows):
        return {"done": False, "why": "without any one budget too little is left to fit"}
    return {"done": True, "why": "", "budgets": rows}


def two_point(table: Table) -> TwoPoint | None:
    """The line through the best runs of the two largest budgets, means over seeds; None where there are not two."""
    best = [table.best(budget) for budget in table.budgets[-2:]]
    if len(best) < 2:
        return None
    low, high = ((float(table.flops[of].mean()), float(table.loss[of].mean())) for of in best)
    return TwoPoint((low[0], high[0]), (low[1], high[1]))


def _baseline(table: Table) -> dict[str, Any]:
    line = two_point(table)
    if line is None:
        return {"done": False, "why": f"{len(table.budgets)} budget(s) in the table, wanted 2"}
    return {"done": True, "why": "", "flops": line.flops, "losses": line.losses, "slope": line.slope}


def _short(notes: Sequence[str]) -> list[str]:
    more = len(notes) - MOST_NOTES
    return [*notes[:MOST_NOTES], *([f"... and {more} more of this kind"] if more > 0 else [])]


def points(tables: Sequence[str], cfg: FitConfig) -> tuple[Table, int]:
    """The points of a table that the settings select, and the number that --max-flops left out."""
    how = {"columns": cfg.columns, "where": cfg.where, "count": cfg.count, "flops_per": cfg.flops_per}
    table = read_table(tables, inputs=FAMILIES[cfg.law].inputs, **how)
    if not cfg.max_flops:
        return table, 0
    kept = table.up_to(cfg.max_flops)
    if not len(kept):
        least = np.fmin(table.flops, table.budget).min()
        raise InputError(
            f"max_flops={cfg.max_flops:g}: all {len(table)} points of {table.source} are above; the smallest has "
            f"{least:.3g} FLOPs, give more"
        )
    return kept, len(table) - len(kept)


def check_enough(table: Table, law: str) -> None:
    """Raises InputError where the points can't determine the law, whatever they are."""
    free = FAMILIES[law].size
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
    for what, values in (("sizes", table.parameters), ("token counts", table.tokens)):
        count = len(np.unique(np.round(np.log(values), 3)))
        if count < LEAST:
            raise InputError(
                f"{table.source}: {count} different {what}; {law} wanted at least {LEAST} to separate its exponents: "
                "add runs"
            )

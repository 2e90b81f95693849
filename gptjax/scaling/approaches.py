"""The three approaches of Hoffmann et al. 2022 to the optimal N and D of a budget, and leave-one-budget-out errors.

    envelope(curves)                      approach 1: the lower envelope of whole training curves
    isoflop(budget, N, D, loss)           approach 2: a parabola through the losses of each budget
    parametric(fit_law(CHINCHILLA, ...))  approach 3: the optimum of a fitted L(N, D), in closed form
    leave_one_budget_out(fit, budget, N, D, loss)

Approach 2 is biased even without noise, since a budget's losses are no parabola: vertices are off by a factor that the
regression carries to every budget, and that grows with the range of sizes and the difference of alpha and beta. With
the law of Hoffmann et al. and 16 points from D_opt / 8 to 8 D_opt, D_opt comes out 2.88 % low and N_opt 2.97 % high.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.section import InputError
from gptjax.scaling.families import POWER
from gptjax.scaling.fits import Fitted, check_columns, ends, fit_law


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """N_opt = k_N C^a and D_opt = k_D C^b, by one approach.

    samples: the same four of each bootstrap, [bootstraps]; empty without bootstraps. loss_law: a fits.Fitted whose
    predict(C) (a PowerLaw), or predict(N, D) at the optimum (approach 3), is the least loss; None with fewer than 3
    budgets. points: the points that the two lines are fitted to, budget, N and D, each [budgets] (empty for
    approach 3). notes: caveats, one sentence each; show all of them.
    """

    approach: str
    k_N: float
    a: float
    k_D: float
    b: float
    samples: dict[str, np.ndarray]
    loss_law: Fitted | None
    points: dict[str, np.ndarray]
    level: float
    notes: tuple[str, ...]

    def interval(self, name: str) -> tuple[float, float]:
        """Percentile interval of k_N, a, k_D or b; (nan, nan) without bootstraps."""
        return self._edges(self.samples[name]) if self.samples else (float("nan"), float("nan"))

    def optimal(self, flops: float) -> dict[str, tuple[float, float, float]]:
        """{"N": (best, low, high), "D": ..., "loss": ...} for a budget in FLOPs; NaN for unknown values.

        The loss is the law's least for the budget; its interval excludes the scatter of single runs.
        """
        optimum: dict[str, tuple[float, float, float]] = {}
        unknown = (np.nan, np.nan)
        for name, k, exponent in (("N", "k_N", "a"), ("D", "k_D", "b")):
            best = getattr(self, k) * flops ** getattr(self, exponent)
            edges = unknown
            if self.samples:
                edges = self._edges(np.exp(np.log(self.samples[k]) + self.samples[exponent] * np.log(flops)))
            optimum[name] = (float(best), edges[0], edges[1])
        if self.loss_law is None:
            return optimum | {"loss": (float("nan"), *unknown)}
        if self.approach == "parametric":
            per = flops / (optimum["N"][0] * optimum["D"][0])
            return optimum | {"loss": self.loss_law.of(lambda law: law.loss(*law.optimal(flops, per)))}
        return optimum | {"loss": self.loss_law.of(lambda law: law.loss(flops))}

    def _edges(self, values: np.ndarray) -> tuple[float, float]:
        low, high = np.nanpercentile(values, ends(self.level))
        return float(low), float(high)


def parametric(fitted: Fitted, flops_per: float = 6.0) -> Allocation:
    """Approach 3: the optimum of a fitted law under C = flops_per * N * D, intervals from its bootstraps.

    The law must have `exponents`, so that its optimum is two powers of C.
    """

    def lines(law: Any) -> dict[str, Any]:
        a, b = law.exponents
        N, D = law.optimal(1.0, flops_per)
        return {"k_N": N, "a": a, "k_D": D, "b": b}

    best = {name: float(value) for name, value in lines(fitted.law).items()}
    samples = {k: np.ravel(v) for k, v in lines(fitted.sampled).items()} if fitted.samples else {}
    return Allocation("parametric", **best, samples=samples, loss_law=fitted, points={}, level=fitted.level, notes=())


@dataclasses.dataclass(frozen=True, eq=False)
class Parabola:
    """loss = c_2 x^2 + c_1 x + c_0 in x = log10 D (or N): coefficients [3], highest power first, and its vertex."""

    budget: float
    coefficients: np.ndarray
    best: float
    loss: float


def parabola(budget: float, size: np.ndarray, loss: np.ndarray) -> Parabola:
    """The least-squares parabola through one budget's losses; `best` is NaN where it has no minimum."""
    x = np.log10(size)
    c = np.polyfit(x - x.mean(), loss, 2)  # centred: log10 D is about 10, and its square takes digits
    if c[0] <= 0:
        return Parabola(budget, c, float("nan"), float("nan"))
    vertex = -c[1] / (2 * c[0])
    shifted = np.array([c[0], c[1] - 2 * c[0] * x.mean(), c[2] - c[1] * x.mean() + c[0] * x.mean() ** 2])
    return Parabola(budget, shifted, float(10 ** (vertex + x.mean())), float(np.polyval(c, vertex)))


def isoflop(budget, N, D, loss, *, bootstraps: int = 0, seed: int = 0, level: float = 0.95) -> Allocation:
    """Approach 2: the vertex of each budget's parabola in log D and in log N, and a line through the vertices.

    budget, N, D, loss: [points]; points of one budget have equal `budget`. A budget with fewer than 3 different sizes,
    or whose losses don't curve upward, is left out, with a note. Raises InputError where fewer than 2 are left.

    Intervals are of noise in the losses: each bootstrap adds to every fitted parabola the deviations of all runs from
    their parabolas, drawn again and widened for the 3 coefficients of each, and repeats the fit. (Drawing runs again
    would leave many a budget of 3 or 4 runs with too few.) They know nothing of the bias of the method.
    """
    check_columns({"budget": budget, "N": N, "D": D, "loss": loss})
    budget, N, D, loss = (np.asarray(x, float) for x in (budget, N, D, loss))

    notes, groups = [], []
    for value in np.unique(budget):
        rows = np.flatnonzero(budget == value)
        if min(len(np.unique(N[rows])), len(np.unique(D[rows]))) < 3:
            notes.append(f"Budget {value:.3g} is left out: {len(rows)} points of fewer than 3 different sizes.")
        elif not all(np.isfinite(parabola(value, size[rows], loss[rows]).best) for size in (N, D)):
            notes.append(f"Budget {value:.3g} is left out: its losses don't curve upward.")
        else:
            groups.append(rows)
    if len(groups) < 2:
        what = "; ".join(notes) or "there is one budget"
        raise InputError(f"{len(groups)} budgets with a best size: wanted at least 2, with 3 sizes each ({what})")
    if len(groups) < 4:
        notes.append(f"The lines go through {len(groups)} budgets: their exponents rest on little.")
    edge = [
        budget[rows[0]] for rows in groups
        if not D[rows].min() < parabola(0, D[rows], loss[rows]).best < D[rows].max()
    ]  # fmt: skip
    notes += [f"Budget {value:.3g}: the best size lies outside the sizes that were run." for value in edge]

    flops = np.array([budget[rows[0]] for rows in groups])
    best = _vertices(groups, N, D, loss)
    lines = _lines(flops, best["N"], best["D"])
    freedom = sum(len(rows) - 3 for rows in groups)
    samples: dict[str, np.ndarray] = {}
    redrawn = None
    if bootstraps and not freedom:
        notes.append("Every parabola goes through its 3 points exactly: there are no intervals.")
    elif bootstraps:
        samples, redrawn, lost = _isoflop_samples(groups, flops, N, D, loss, bootstraps, np.random.default_rng(seed))
        if freedom < 10:
            notes.append(f"The intervals rest on {freedom} deviations from the parabolas.")
        if lost:
            notes.append(f"{lost} of {bootstraps} resamples had a budget without a minimum; they are left out.")
        if lost == bootstraps:
            samples, redrawn = {}, None
    loss_law = _least_losses(flops, best["loss"], notes, level, redrawn)
    points = {"budget": flops, "N": best["N"], "D": best["D"], "loss": best["loss"]}
    return Allocation(
        "isoflop", **lines, samples=samples, loss_law=loss_law, points=points, level=level, notes=tuple(notes)
    )


def _vertices(groups: list[np.ndarray], N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> dict[str, np.ndarray]:
    of_N, of_D = ([parabola(0, size[rows], loss[rows]) for rows in groups] for size in (N, D))
    best = {"N": [p.best for p in of_N], "D": [p.best for p in of_D], "loss": [p.loss for p in of_D]}
    return {name: np.array(values) for name, values in best.items()}


def _isoflop_samples(groups, flops, N, D, loss, bootstraps, rng) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Lines through the vertices of parabolas with redrawn noise, their losses, and the number without a minimum."""
    fitted, scatter = loss.copy(), []
    for rows in groups:
        fit = parabola(0, D[rows], loss[rows])
        fitted[rows] = np.polyval(fit.coefficients, np.log10(D[rows]))
        scatter += list(loss[rows] - fitted[rows])
    freedom = sum(len(rows) - 3 for rows in groups)
    wide = np.array(scatter) * np.sqrt(len(scatter) / freedom)
    kept, least = [], []
    for _ in range(bootstraps):
        best = _vertices(groups, N, D, fitted + rng.choice(wide, len(loss)))
        if np.all(np.isfinite(best["N"]) & np.isfinite(best["D"])):
            kept.append(_lines(flops, best["N"], best["D"]))
            least.append(best["loss"])
    lines = {k: np.array([line[k] for line in kept]) for k in ("k_N", "a", "k_D", "b")}
    return lines, np.array(least), bootstraps - len(kept)


def _lines(flops: np.ndarray, N: np.ndarray, D: np.ndarray) -> dict[str, float]:
    middle, x = np.log(flops).mean(), np.log(flops)
    lines = {}
    for k, exponent, size in (("k_N", "a", N), ("k_D", "b", D)):
        slope, height = np.polyfit(x - middle, np.log(size), 1)
        lines |= {k: float(np.exp(height - slope * middle)), exponent: float(slope)}
    return lines


def _least_losses(
    flops: np.ndarray, loss: np.ndarray, notes: list[str], level: float, redrawn: np.ndarray | None = None
) -> Fitted | None:
    if len(np.unique(flops)) < 3:
        notes.append("Fewer than 3 budgets: no law for the least loss of a budget.")
        return None
    fitted = fit_law(POWER, flops, loss, level=level, redrawn=redrawn)
    notes += [f"The law of the least loss: {note}" for note in fitted.notes]
    return fitted


def envelope(
    curves: Sequence[tuple[float, np.ndarray, np.ndarray]], *, flops_per: float = 6.0, budgets: int = 1500,
    bootstraps: int = 0, seed: int = 0, level: float = 0.95,
) -> Allocation:  # fmt: skip
    """Approach 1: the size with the least loss at each budget, along whole training curves.

    curves: (N, tokens [steps], loss [steps]) of each run; a size may have several. Losses are compared at `budgets`
    budgets, evenly spaced in log C. The line is fitted to the takeovers: where the best size changes to a larger one, N
    is their geometric mean. (Hoffmann et al. fit all 1,500 budgets; with few sizes that flattens the line, since below
    its first takeover the smallest size is best only because no smaller one was run.) Smooth noisy curves first, and
    use curves of finished schedules: one at its peak learning rate lies too high.

    Intervals: sizes resampled, as whole curves. Raises InputError for a curve that is not finite and above 0, or
    fewer than 2 takeovers (which take 3 sizes).
    """
    for N, tokens, loss in curves:
        values = np.concatenate([[N], np.ravel(tokens), np.ravel(loss)])
        if len(np.ravel(tokens)) != len(np.ravel(loss)) or not np.all(np.isfinite(values) & (values > 0)):
            raise InputError(f"the curve of N={N:g}: wanted as many tokens as losses, all finite numbers above 0")
    best = _takeovers(curves, flops_per, budgets)
    if (takeovers := len(best["N"])) < 2:
        raise InputError(f"the best size changes {takeovers} times along the curves: wanted at least 2, of 3 sizes")
    notes: list[str] = []
    if takeovers < 4:
        notes.append(f"The lines go through {takeovers} takeovers: their exponents rest on little.")
    rng, sizes, kept = np.random.default_rng(seed), np.unique([N for N, _, _ in curves]), []
    for _ in range(bootstraps):
        drawn = set(rng.choice(sizes, len(sizes)))
        sample = _takeovers([curve for curve in curves if curve[0] in drawn], flops_per, budgets)
        if len(sample["N"]) > 1:
            kept.append(_lines(sample["budget"], sample["N"], sample["D"]))
    if lost := bootstraps - len(kept):
        notes.append(f"{lost} of {bootstraps} resamples had fewer than 2 takeovers; they are left out.")
    samples = {k: np.array([line[k] for line in kept]) for k in ("k_N", "a", "k_D", "b")} if kept else {}
    loss_law = _least_losses(best["budget"], best["loss"], notes, level)
    lines = _lines(best["budget"], best["N"], best["D"])
    return Allocation(
        "envelope", **lines, samples=samples, loss_law=loss_law, points=best, level=level, notes=tuple(notes)
    )


def _takeovers(curves, flops_per: float, budgets: int) -> dict[str, np.ndarray]:
    """The points where a larger size becomes best: budget, N (geometric mean of both), D and loss, each [takeovers]."""
    reach = [flops_per * N * np.ravel(tokens) for N, tokens, _ in curves]
    flops = np.geomspace(min(C.min() for C in reach), max(C.max() for C in reach), budgets)
    loss = np.full((len(curves), budgets), np.inf)
    for row, (C, (_, _, values)) in enumerate(zip(reach, curves)):
        order, inside = np.argsort(C), (flops >= C.min()) & (flops <= C.max())
        loss[row, inside] = np.interp(np.log(flops[inside]), np.log(C[order]), np.ravel(values)[order])
    # A takeover counts only where both sizes have a loss, not where a curve ends.
    best = np.argmin(loss, axis=0)
    at = [
        i for i in range(budgets - 1)
        if curves[best[i]][0] < curves[best[i + 1]][0] and np.all(np.isfinite(loss[best[i : i + 2]][:, i : i + 2]))
    ]  # fmt: skip
    N = np.array([np.sqrt(curves[best[i]][0] * curves[best[i + 1]][0]) for i in at])
    C = np.array([np.sqrt(flops[i] * flops[i + 1]) for i in at])
    return {"budget": C, "N": N, "D": C / flops_per / N, "loss": np.array([loss[best[i], i] for i in at])}


def leave_one_budget_out(fit: Callable[..., Fitted], budget, N, D, *more) -> list[dict[str, Any]]:
    """Errors of a law fitted without a budget's runs on these runs: one dict a budget, in ascending order.

    fit: a function of N, D, the law's other inputs and, last, the losses, each [points].

    budget; points; error: mean over its runs of prediction / loss - 1; worst: the largest absolute error; beyond: True
    where no other run took as much compute (N D), so that the error is one of extrapolation; why: the reason where the
    rest can't be fitted and the errors are NaN, else empty. Runs whose budget is NaN are in every fit.
    """
    budget, N, D, *more = (np.asarray(x, float) for x in (budget, N, D, *more))
    *inputs, loss = N, D, *more
    rows = []
    for value in np.unique(budget[np.isfinite(budget)]):
        out = budget == value
        beyond = (N * D)[out].max() > np.max((N * D)[~out], initial=0)
        row = {"budget": float(value), "points": int(out.sum()), "beyond": bool(beyond)}
        try:
            law = fit(*(x[~out] for x in (*inputs, loss))).law
            error = law.loss(*(x[out] for x in inputs)) / loss[out] - 1
            row |= {"error": float(error.mean()), "worst": float(np.abs(error).max()), "why": ""}
        except InputError as refusal:
            row |= {"error": float("nan"), "worst": float("nan"), "why": str(refusal)}
        rows.append(row)
    return rows

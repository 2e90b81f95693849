"""The three approaches of Hoffmann et al. 2022 to the optimal N and D of a budget, and leave-one-budget-out errors.

    envelope(curves)                      approach 1: the lower envelope of whole training curves
    isoflop(budget, N, D, loss)           approach 2: the minimum of each budget's losses
    parametric(fit_law(CHINCHILLA, ...))  approach 3: the optimum of a fitted L(N, D), in closed form
    leave_one_budget_out(fit, budget, N, D, loss)

ASSUMES says what each takes for granted: 1 and 2 that the optimum is a power of C over all budgets, 3 that the law
holds for every run, also for those far from the optimum, where it is often wrong. Intervals of 1 and 2 are those of a
straight line in logarithms: they rest on how far minima, or takeovers, scatter about it, whatever scatters them.

Hoffmann et al. fit a parabola through all losses of a budget. That is biased even without noise, since losses are no
parabola, and the more the wider the sizes range: over three decades (Porian et al. 2024) it gives N ~ C^1.2 where
interpolation gives C^0.87. Here a cubic is fitted to log loss near the minimum alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.section import InputError
from gptjax.scaling.families import POWER
from gptjax.scaling.fits import Fitted, check_columns, ends, fit_law

NEAR_FACTOR, NEAR_SIZES = 4.0, 3  # a minimum rests on the sizes within this factor, and on 3 to each side of it
LOGS = ("log_k_N", "a", "log_k_D", "b")
CUBIC_SIZES = 5  # sizes that a cubic takes; fewer have a parabola
NEIGHBOURS = tuple(np.linspace(0, -0.49, 21))  # correlations of two takeovers that have a run in common
CLEAR = 2.0  # standard deviations that the line at a takeover is away from the ends of the budgets
DRAWS = 16  # draws of a line for each bootstrap asked for: they cost nothing, and 1,000 leave a rough edge
ASSUMES = {
    "envelope": "N-opt is a power of C; each size has a curve of finished runs around its takeovers",
    "isoflop": "N-opt is a power of C; each budget has sizes on both sides of its minimum; log loss is cubic nearby",
    "parametric": "the law holds for all runs, also for those far from the optimum",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """N_opt = k_N C^a and D_opt = k_D C^b, by one approach.

    samples: LOGS of each draw (k itself may overflow); empty without bootstraps. loss_law: a fits.Fitted whose
    predict(C) (a PowerLaw), or predict(N, D) at the optimum (approach 3), is the least loss; None with fewer than 3
    budgets. points: the points that the two lines are fitted to, budget, N and D, each [budgets] (empty for
    approach 3). notes: caveats, one sentence each; show all of them. minima: of approach 2 by budget, over N and D.
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
    minima: dict[float, tuple["Minimum", "Minimum"]] = dataclasses.field(default_factory=dict)

    def interval(self, name: str) -> tuple[float, float]:
        """Percentile interval of k_N, a, k_D or b; (nan, nan) without bootstraps."""
        if not self.samples:
            return float("nan"), float("nan")
        edges = self._edges(self.samples[f"log_{name}" if name[0] == "k" else name])
        return (float(np.exp(edges[0])), float(np.exp(edges[1]))) if name[0] == "k" else edges

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
                edges = self._edges(self.samples[f"log_{k}"] + self.samples[exponent] * np.log(flops))
            optimum[name] = (float(best), float(np.exp(edges[0])), float(np.exp(edges[1])))
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

    best: dict[str, Any] = {name: float(value) for name, value in lines(fitted.law).items()}
    samples = {}
    if fitted.samples:
        of = lines(fitted.sampled)
        samples = {name: np.ravel(np.log(of[name[4:]]) if name[4:] in of else of[name]) for name in LOGS}
    return Allocation("parametric", **best, samples=samples, loss_law=fitted, points={}, level=fitted.level, notes=())


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The minimum of one budget's losses over a size, N or D.

    best; loss there; sizes: the different ones that it rests on, from `low` to `high`. log loss is the polynomial with
    `coefficients`, highest power first, of log(size / centre).
    """

    best: float
    loss: float
    sizes: int
    low: float
    high: float
    centre: float
    coefficients: tuple[float, ...]


def minimum(size: np.ndarray, loss: np.ndarray) -> Minimum | None:
    """The minimum of a cubic in log size through the log losses near it; None where it is not among the sizes.

    size, loss: [points]. Near are NEAR_SIZES sizes to each side of the best one and all within NEAR_FACTOR of it, first
    of the run of least loss, then of the minimum found, until they stay. Below CUBIC_SIZES it is a parabola.
    """
    x, y = np.log(size), np.log(loss)
    sizes = np.unique(x)
    best = sizes[np.argmin([y[x == at].mean() for at in sizes])]
    near = np.zeros(len(sizes), bool)
    for _ in range(8):
        ranks = np.abs(np.arange(len(sizes)) - np.argmin(np.abs(sizes - best)))
        before, near = near, (ranks <= NEAR_SIZES) | (np.abs(sizes - best) <= np.log(NEAR_FACTOR))
        if np.array_equal(near, before):
            break
        (low, high), used = sizes[near][[0, -1]], np.isin(x, sizes[near])
        centre = (low + high) / 2
        c = np.polyfit(x[used] - centre, y[used], 3 if near.sum() >= CUBIC_SIZES else 2)
        turns = np.roots(np.polyder(c))
        turns = np.real(turns)[np.isreal(turns) & (np.polyval(np.polyder(c, 2), np.real(turns)) > 0)]
        turns = turns[np.abs(turns) < (high - low) / 2]
        if not len(turns):
            return None
        best = centre + turns[np.argmin(np.polyval(c, turns))]
    exact = (float(v) for v in np.exp([best, np.polyval(c, best - centre), low, high, centre]))
    at, least, low, high, centre = exact
    return Minimum(at, least, int(near.sum()), low, high, centre, tuple(map(float, c)))


def isoflop(budget, N, D, loss, *, bootstraps: int = 0, seed: int = 0, level: float = 0.95) -> Allocation:
    """Approach 2: the minimum of each budget's losses over N and over D, and a line through the minima.

    budget, N, D, loss: [points]; points of one budget have equal `budget`. A budget with fewer than 3 different sizes,
    or whose losses have no minimum among the sizes, is left out, with a note. Raises InputError where fewer than 2 are
    left. Intervals are those of the line (_line): of noise, and of whatever else scatters the minima.
    """
    check_columns({"budget": budget, "N": N, "D": D, "loss": loss})
    budget, N, D, loss = (np.asarray(x, float) for x in (budget, N, D, loss))
    notes, found = [], {}
    for value in np.unique(budget):
        of = budget == value
        if min(len(np.unique(N[of])), len(np.unique(D[of]))) < 3:
            notes.append(f"Budget {value:.3g} is left out: {of.sum()} points of fewer than 3 different sizes.")
            continue
        by_N, by_D = (minimum(size[of], loss[of]) for size in (N, D))
        if by_N and by_D:
            found[float(value)] = by_N, by_D
        else:
            notes.append(f"Budget {value:.3g} is left out: its least loss lies outside of the sizes that were run.")
    if len(found) < 2:
        what = "; ".join(notes) or "there is one budget"
        raise InputError(f"{len(found)} budgets with a best size: wanted at least 2, with 3 sizes each ({what})")
    if len(found) < 4:
        notes.append(f"The lines go through {len(found)} budgets: their exponents rest on little.")
    flops = np.array(list(found))
    best_N, best_D, least, sizes = (
        np.array(v) for v in zip(*((n.best, d.best, n.loss, n.sizes) for n, d in found.values()))
    )
    notes.append(f"The minima of {len(found)} budgets rest on {_numbers(sizes)} sizes each.")
    lines = _line(flops, [best_N, best_D], bootstraps, seed)
    if bootstraps and len(lines) == 1:
        notes.append("The line goes through 2 budgets exactly: there are no intervals.")
    return Allocation(
        "isoflop", **_best_and_samples(lines[:, 0, 0], lines[:, 1, 0], lines[:, 0, 1], lines[:, 1, 1]), minima=found,
        loss_law=_least_losses(flops, least, notes, level, bootstraps, seed),
        points={"budget": flops, "N": best_N, "D": best_D, "loss": least}, level=level, notes=tuple(notes),
    )  # fmt: skip


def _numbers(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _best_and_samples(log_k_N: np.ndarray, a: np.ndarray, log_k_D: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Fields of an Allocation of lines whose first is the fitted one and whose others are draws."""
    samples = {name: values[1:] for name, values in zip(LOGS, (log_k_N, a, log_k_D, b))} if len(a) > 1 else {}
    best = {"k_N": np.exp(log_k_N[0]), "a": a[0], "k_D": np.exp(log_k_D[0]), "b": b[0]}
    return {name: float(value) for name, value in best.items()} | {"samples": samples}


def _line(
    x: np.ndarray, ys: Sequence[np.ndarray], bootstraps: int, seed: int, correlations: Sequence[float] = (0.0,)
) -> np.ndarray:
    """y = k x^slope for each of ys, and draws of it: [1 + DRAWS * bootstraps, (log k, slope), ys].

    Least squares in logarithms. Percentiles of the draws are Student's t intervals, which hold whatever the number of
    points, and draws of several ys move together as their residuals do. Without bootstraps, or with 2 points, none.
    correlations: those that the noise of neighbouring points may have, equally likely beforehand; each is drawn as
    often as the residuals bear it out (the restricted likelihood), and gives its own variance of the same line.
    """
    middle, points = np.log(x).mean(), len(x)
    design, log_y = np.stack([np.ones(points), np.log(x) - middle], axis=1), np.log(np.stack(ys, axis=1))
    line = np.linalg.lstsq(design, log_y)[0]
    number, free = DRAWS * bootstraps if points > 2 else 0, max(points - 2, 1)
    residuals, factors, likelihoods = [], [], []
    for correlation in correlations:
        root = np.linalg.cholesky(np.eye(points) + correlation * (np.eye(points, k=1) + np.eye(points, k=-1)))
        Q, R = np.linalg.qr(np.linalg.solve(root, design), mode="complete")
        residuals.append((Q.T @ np.linalg.solve(root, log_y))[2:])
        half = np.linalg.pinv(design) @ root  # half @ half.T is the covariance of the line
        factors.append(np.linalg.cholesky(half @ half.T))
        scale = np.linalg.slogdet(residuals[-1].T @ residuals[-1])[1] if points > 2 else 0.0
        likelihoods.append(-np.log(np.abs(np.diag(root))).sum() - np.log(np.abs(np.diag(R))).sum() - free / 2 * scale)
    rng = np.random.default_rng(seed)
    of = np.zeros(number, int)
    if len(correlations) > 1:
        weights = np.exp(np.array(likelihoods) - max(likelihoods))
        of = rng.choice(len(correlations), number, p=weights / weights.sum())
    chance = rng.normal(size=(number, 2, points - 2)) / np.sqrt(rng.chisquare(free, (number, 1, 1)))
    off = np.array(factors)[of] @ (chance @ np.array(residuals)[of])
    lines = line + np.concatenate([np.zeros((1, 2, len(ys))), off])
    lines[:, 0] -= middle * lines[:, 1]
    return lines


def _least_losses(
    flops: np.ndarray, loss: np.ndarray, notes: list[str], level: float, bootstraps: int = 0, seed: int = 0
) -> Fitted | None:
    if len(np.unique(flops)) < 3:
        notes.append("Fewer than 3 budgets: no law for the least loss of a budget.")
        return None
    fitted = fit_law(POWER, flops, loss, level=level, bootstraps=bootstraps, seed=seed)
    notes += [f"The law of the least loss: {note}" for note in fitted.notes]
    return fitted


def envelope(
    curves: Sequence[tuple[float, np.ndarray, np.ndarray]], *, flops_per: float = 6.0, budgets: int = 1500,
    whole: bool = True, bootstraps: int = 0, seed: int = 0, level: float = 0.95,
) -> Allocation:  # fmt: skip
    """Approach 1: the size with the least loss at each budget, along whole training curves.

    curves: (N, tokens [steps], loss [steps]) of each run; a size may have several. whole: a curve is one run; else its
    points are runs of their own. Losses are compared at `budgets`
    budgets, evenly spaced in log C, between whose points they are straight in log loss and log C. The line is fitted to
    the takeovers: where the best size changes to a larger one, N is their geometric mean. (Hoffmann et al. fit all
    1,500 budgets; with few sizes that flattens the line, since below its first takeover the smallest size is best only
    because no smaller one was run.) A takeover's N is exact and its C is not, so the line is log C over log N. Smooth
    noisy curves first, and use curves of finished schedules: one at its peak learning rate lies too high.

    A takeover that noise moves beyond the ends of the budgets is not seen, and one that it moves back is: only those
    are used where the line itself is CLEAR of the ends, else it is too steep in N.

    Intervals are those of the line (_line). A whole curve that lies too low is taken over too late, and takes over too
    early: its two takeovers err in opposite directions, so that the line errs less than independent ones would let it.
    Raises InputError for a curve that is not finite and above 0, or fewer than 2 takeovers (which take 3 sizes).
    """
    for N, tokens, loss in curves:
        values = np.concatenate([[N], np.ravel(tokens), np.ravel(loss)])
        if len(np.ravel(tokens)) != len(np.ravel(loss)) or not np.all(np.isfinite(values) & (values > 0)):
            raise InputError(f"the curve of N={N:g}: wanted as many tokens as losses, all finite numbers above 0")
    best = _takeovers(curves, flops_per, budgets)
    found = len(best["N"])
    best = _clear_of_ends(best, [flops_per * N * tokens for N, tokens, _ in curves])
    if (takeovers := len(best["N"])) < 2:
        raise InputError(f"the best size changes {takeovers} times along the curves: wanted at least 2, of 3 sizes")
    notes = [
        f"The line goes through {takeovers} takeovers" + (": its exponents rest on little." if takeovers < 4 else ".")
    ]
    if takeovers < found:
        notes.append(f"{found - takeovers} takeovers near the ends of the budgets are left out.")
    lines = _line(best["N"], [best["budget"]], bootstraps, seed, NEIGHBOURS if whole else (0.0,))
    if bootstraps and len(lines) == 1:
        notes.append("The line goes through 2 takeovers exactly: there are no intervals.")
    log_k, slope = lines[lines[:, 1, 0] > 0, :, 0].T  # a C that falls over N is no optimum
    if len(slope) < len(lines):
        notes.append(f"{1 - len(slope) / len(lines):.1%} of the line's draws fall; they are left out of the intervals.")
    log_k_N = -log_k / slope  # C = k N^slope, and C = flops_per N D
    return Allocation(
        "envelope", **_best_and_samples(log_k_N, 1 / slope, -np.log(flops_per) - log_k_N, 1 - 1 / slope),
        loss_law=_least_losses(best["budget"], best["loss"], notes, level), points=best, level=level,
        notes=tuple(notes),
    )  # fmt: skip


def _clear_of_ends(best: dict[str, np.ndarray], reach: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The takeovers at whose N the line through them is CLEAR of the ends of the budgets, at least 3."""
    x, y = np.log(best["N"]), np.log(best["budget"])
    ends = np.log([min(C.min() for C in reach), max(C.max() for C in reach)])
    used = np.ones(len(x), bool)
    for _ in range(8):
        if used.sum() < 3:
            break
        line = np.polyfit(x[used], y[used], 1)
        scatter = np.sqrt(np.sum((y[used] - np.polyval(line, x[used])) ** 2) / (used.sum() - 2))
        expected, margin = np.polyval(line, x), CLEAR * scatter
        clear = (expected > ends[0] + margin) & (expected < ends[1] - margin)
        if clear.sum() < 3 or np.array_equal(clear, used):
            break
        used = clear
    return {name: values[used] for name, values in best.items()}


def _takeovers(curves, flops_per: float, budgets: int) -> dict[str, np.ndarray]:
    """The points where larger sizes become best: budget, N (geometric mean of both), D and loss, each [takeovers].

    A size is taken over where the fewest budgets are exceptions: below, no larger size is best, above, a larger one.
    With noise the best size may change to and fro about it. A size that is never best shares its neighbour's point.
    """
    reach = [flops_per * N * np.ravel(tokens) for N, tokens, _ in curves]
    flops = np.geomspace(min(C.min() for C in reach), max(C.max() for C in reach), budgets)
    sizes = np.unique([N for N, _, _ in curves])
    loss = np.full((len(sizes), budgets), np.inf)
    for C, (N, _, values) in zip(reach, curves):
        order, inside = np.argsort(C), (flops >= C.min()) & (flops <= C.max())
        along = np.exp(np.interp(np.log(flops[inside]), np.log(C[order]), np.log(np.ravel(values)[order])))
        row = np.searchsorted(sizes, N)
        loss[row, inside] = np.minimum(loss[row, inside], along)
    best = np.argmin(loss, axis=0)
    larger = best > np.arange(len(sizes) - 1)[:, None]  # [sizes - 1, budgets]
    exceptions = np.cumsum(np.pad(2 * larger - 1, ((0, 0), (1, 0))), axis=1)
    fewest = exceptions == exceptions.min(axis=1, keepdims=True)
    at = np.round([np.flatnonzero(row).mean() for row in fewest]).astype(int)
    takeovers = []
    for i in np.unique(at[(at > 0) & (at < budgets)]):
        below, above = np.flatnonzero(at == i)[0], np.flatnonzero(at == i)[-1] + 1
        # It counts only where both sizes have a loss, not where a curve ends.
        if np.all(np.isfinite(loss[best[i - 1 : i + 1]][:, i - 1 : i + 1])):
            C, N = (flops[i - 1] * flops[i]) ** 0.5, (sizes[below] * sizes[above]) ** 0.5
            takeovers.append((C, N, C / (flops_per * N), loss[:, i - 1 : i + 1].min(axis=0).mean()))
    return dict(zip(("budget", "N", "D", "loss"), np.array(takeovers).reshape(-1, 4).T))


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

"""Fits a law to a table of runs: the best coefficients, bootstrap intervals, predictions with intervals.

    fitted = fit_law(CHINCHILLA, N, D, loss, bootstraps=1000)
    fitted.law                                       # laws.Chinchilla(E, A, B, alpha, beta)
    fitted.interval("alpha")                         # (low, high)
    fitted.predict(1e9, 2e10)                        # (loss, low, high) of a new run
    fitted.of(lambda law: law.optimal(1e21)[0])      # (N_opt, low, high)
    Fitted.of_record(json.loads(json.dumps(fitted.record())))  # the same again

The parametric fit is that of Hoffmann et al. 2022 (section 3.3): Huber's function of width 1e-3 on log prediction - log
loss, least by L-BFGS from a grid of 4,500 starts (each law has its own: families.py). All of them descend for 15 turns
and the lowest 256 to the end. It is summed over runs, not averaged: an average is so small that an optimizer's default
tolerance ends it early (Besiroglu et al. 2024, section 4); here each descent ends by its gradient, and one that has not
goes on from where it is (`settle`).

Intervals are percentiles of fits to redrawn losses (`redraw`); sizes and token counts stay as they were chosen. Drawing
whole runs again draws a worse design than the one that was run; its intervals are the wider, the fewer runs there are
to a coefficient (El Karoui & Purdom 2018): 1.2 times the true scatter at 80 runs, 1.5 times at 30, measured with noise
of ten times Huber's width. Redrawn losses descend from the optimum of the true ones and from the 4 starts of the grid
that lie lowest.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.section import InputError
from gptjax.scaling.descent import Minimum, Problem, minimize
from gptjax.scaling.families import Family
from gptjax.scaling.laws import Chinchilla, DataConstrained, Kaplan, OverTraining, PowerLaw

KINDS: dict[str, type] = {kind.__name__: kind for kind in (Chinchilla, OverTraining, PowerLaw, Kaplan, DataConstrained)}
SCREEN = 15  # turns after which only the lowest starts of a grid go on
FINAL = 256  # so many of them
NEAR = 4  # starts of the grid that a resample descends from, beside the optimum of all points
FLAT = 1e-5  # a descent whose gradient is larger has not converged: see descent.Minimum
ROUNDS = 4  # descents that one which has not converged is given after its first
SAME = 1e-6  # objectives that differ by less, relatively, are one optimum
NO_FLOOR = 1e-3  # an E below this share of the least loss says no more than 0 does


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A law fitted to runs, and what redrawing their losses says of it.

    law: one of KINDS with float coefficients.
    inputs: the law's inputs by name (Family.inputs), each of shape [points]; loss [points] in nats a token.
    samples: coefficient -> array [bootstraps]; empty where none were asked for or none could be had.
    objective: what was minimized, a sum over the points; gradient: its largest entry there, scaled as in
    descent.Minimum (1e-8 is converged). starts: descents carried to the end; agreed: how many of them ended in this
    optimum. unconverged: bootstraps whose gradient stayed above 1e-5; they are kept in the samples.
    notes: plain sentences about what a reader should not take for granted; show all of them.
    """

    law: Any
    inputs: dict[str, np.ndarray]
    loss: np.ndarray
    samples: dict[str, np.ndarray]
    objective: float
    gradient: float
    starts: int
    agreed: int
    unconverged: int
    level: float
    notes: tuple[str, ...]

    @property
    def coefficients(self) -> dict[str, float]:
        return dataclasses.asdict(self.law)

    @property
    def residuals(self) -> np.ndarray:
        """log loss - log prediction of each point: about the relative error, positive where a run is worse."""
        return np.log(self.loss) - np.log(self.law.loss(*self.inputs.values()))

    @property
    def sampled(self) -> Any:
        """The law with coefficients of shape [bootstraps, 1]: sampled.loss(N, D) is [bootstraps, points]."""
        return type(self.law)(**{name: sample[:, None] for name, sample in self.samples.items()})

    def interval(self, name: str) -> tuple[float, float]:
        """Percentile interval of a coefficient, at `level`; (nan, nan) without bootstraps."""
        return _percentiles(self.samples.get(name), self.level)

    def of(self, function: Callable[[Any], Any]) -> tuple[float, float, float]:
        """(value, low, high) of any number that follows from the law, such as lambda law: law.exponents[0]."""
        values = np.ravel(function(self.sampled)) if self.samples else None
        return (float(np.squeeze(function(self.law))), *_percentiles(values, self.level))

    def predict(self, *inputs, new_run: bool = True, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss, low, high) at the law's inputs (N, D, perhaps U; C for a PowerLaw), arrays of their shape.

        The interval is meant to hold a new run's loss: each bootstrap's law, times the scatter of the fitted points
        about the law. With new_run=False it is of the law alone, which more runs narrow without end. It knows nothing
        of what lies beyond the points. NaN without bootstraps.
        """
        arrays = [np.atleast_1d(np.asarray(x, float)) for x in inputs]
        loss = self.law.loss(*arrays)
        if not self.samples:
            return loss, np.full_like(loss, np.nan), np.full_like(loss, np.nan)
        draws = self.sampled.loss(*arrays)
        if new_run:
            size = len(self.coefficients)
            wider = np.sqrt(len(self.loss) / max(len(self.loss) - size, 1))  # a fit takes `size` degrees of the scatter
            draws = draws * np.exp(wider * np.random.default_rng(seed).choice(self.residuals, draws.shape))
        low, high = np.percentile(draws, ends(self.level), axis=0)
        return loss, low, high

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        arrays = {"loss": self.loss.tolist(), "samples": {k: v.tolist() for k, v in self.samples.items()}}
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"notes": list(self.notes)}
        inputs = {k: v.tolist() for k, v in self.inputs.items()}
        return rest | arrays | {"law": type(self.law).__name__, "inputs": inputs, "coefficients": self.coefficients}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Fitted":
        """What `record` wrote; raises InputError where a part is missing or the law is unknown."""
        try:
            values = {f.name: record[f.name] for f in dataclasses.fields(cls)}
            values["law"] = KINDS[record["law"]](**record["coefficients"])
        except (KeyError, TypeError) as error:
            raise InputError(f"not the record of a fit: {error}; wanted what gptjax fit wrote") from None
        for name in ("inputs", "samples"):
            values[name] = {k: np.asarray(v, float) for k, v in record[name].items()}
        return cls(**values | {"loss": np.asarray(record["loss"], float), "notes": tuple(record["notes"])})


def fit_law(
    family: Family, *columns, delta: float = 1e-3, bootstraps: int = 0, seed: int = 0, level: float = 0.95,
    redrawn: np.ndarray | None = None,
) -> Fitted:  # fmt: skip
    """Fits a law to its inputs and, last, the losses in nats a token, each [points].

    redrawn: [bootstraps, points], other losses that the points might have had; the samples are then fits to these,
    and `bootstraps` and `seed` are of no use. Raises InputError, in one line, for arrays that differ in length,
    anything that is not finite and above 0, fewer points than coefficients, inputs that can't tell them (Family.check)
    and a coefficient that no loss depends on.
    """
    named = dict(zip((*family.inputs, "loss"), (np.asarray(x, float) for x in columns), strict=True))
    check(named, family.size)
    *inputs, loss = named.values()
    family.check(*inputs)
    problem, starts = family.problem(*inputs, loss, delta=delta), family.starts
    if not 0 < level < 1:
        raise InputError(f"level={level}: wanted a number between 0 and 1, such as 0.95")
    found = _descend_grid(problem, starts)
    best = int(np.argmin(found.objective_B))
    theta_P, points, size = found.theta_BP[best], len(loss), family.size
    agreed = _agree(found.objective_B, found.objective_B[best], problem)
    law = family.law(*theta_P)
    law = type(law)(**{k: float(v) for k, v in dataclasses.asdict(law).items()})
    _check_told(law, inputs)

    notes = []
    if found.gradient_B[best] > FLAT:
        notes.append(f"The fit has not converged: a gradient of {found.gradient_B[best]:.1e} is left.")
    if agreed < 2:
        notes.append(
            f"Only one of the {len(found.turns_B)} best starts ended in the optimum: there may be a lower one."
        )
    samples, unconverged = {}, 0
    if redrawn is None and bootstraps and points == size:
        notes.append(f"{points} points fit {size} coefficients exactly: there are no intervals.")
    elif redrawn is None and bootstraps:
        if points < 2 * size:
            notes.append(f"{points} points for {size} coefficients: the intervals are rough at best.")
        redrawn = redraw(problem, theta_P, bootstraps, np.random.default_rng(seed))
    if redrawn is not None:
        near_SP = neighbours(problem, starts)
        resampled = refit(problem, np.vstack([theta_P, near_SP]), redrawn)
        with np.errstate(over="ignore"):
            samples = dataclasses.asdict(family.law(*resampled.theta_BP.T))
        finite_B = np.all([np.isfinite(sample) for sample in samples.values()], axis=0)
        samples = {name: sample[finite_B] for name, sample in samples.items()} if finite_B.any() else {}
        if not finite_B.all():
            notes.append(
                f"{np.sum(~finite_B)} of {len(redrawn)} resamples have an exponent without bound and are left out: "
                "add runs of other sizes and token counts."
            )
        unconverged = int(np.sum(resampled.gradient_B[finite_B] > FLAT))
        if unconverged:
            notes.append(
                f"{unconverged} of {len(redrawn)} resamples have not converged and are kept: many laws fit these "
                "runs about as well. Trust intervals of losses near the runs before those of single coefficients."
            )
    floor_B = np.append(samples.get("E", []), getattr(law, "E", np.inf))
    none_B = floor_B < NO_FLOOR * loss.min()
    if none_B.sum() > (1 - level) / 2 * len(none_B):
        what = "the fit" if none_B[-1] else f"{none_B.sum()} of {len(none_B) - 1} resamples"
        notes.append(
            f"E is 0 in {what}: these runs do not tell the loss that no budget goes below. Larger budgets would; "
            "far beyond the runs, predictions are rough."
        )
    return Fitted(
        law, dict(zip(family.inputs, inputs)), loss, samples, float(found.objective_B[best]),
        float(found.gradient_B[best]), len(found.turns_B), agreed, unconverged, level, tuple(notes),
    )  # fmt: skip


def check(columns: dict[str, np.ndarray], coefficients: int = 0) -> None:
    """Raises InputError unless each column has one finite number above 0 for each loss, and there are enough."""
    for name, values in columns.items():
        if values.ndim != 1 or len(values) != len(columns["loss"]):
            raise InputError(f"{name} has the shape {values.shape}: wanted one number for each loss")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise InputError(f"{name}={values[bad[0]]:g} at point {bad[0]}: wanted a finite number above 0")
    if (points := len(columns["loss"])) < coefficients:
        raise InputError(f"{points} points for the {coefficients} coefficients of the law: wanted at least as many")


def _check_told(law: Any, inputs: Sequence[np.ndarray]) -> None:
    """Raises InputError for a coefficient that has no say in any loss, such as R_N where no run has too large an N."""
    for name in dataclasses.asdict(law):
        with np.errstate(all="ignore"):
            others = [dataclasses.replace(law, **{name: value}).loss(*inputs) for value in (1.0, 2.0)]
        if all(np.array_equal(other, law.loss(*inputs)) for other in others):
            raise InputError(
                f"no loss of these {len(inputs[0])} runs depends on {name} of the law fitted to them: wanted some that "
                "do, or a law without it"
            )


def _descend_grid(problem: Problem, start_SP: np.ndarray) -> Minimum:
    """A short descent from every start, then from the lowest FINAL of their ends; the best goes on to the end."""
    first = minimize(problem, start_SP, turns=SCREEN)
    lowest = np.argsort(first.objective_B)[:FINAL]
    found = minimize(problem, first.theta_BP[lowest])
    if found.gradient_B[np.argmin(found.objective_B)] > FLAT:
        found = settle(problem, found)
    return found


def neighbours(problem: Problem, start_SP: np.ndarray) -> np.ndarray:
    """The NEAR starts of the grid with the lowest objective as they stand."""
    there = minimize(problem, start_SP, turns=0)
    return start_SP[np.argsort(there.objective_B)[:NEAR]]


def redraw(problem: Problem, theta_P: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Losses that the runs might have had, [number, points]: the law's, and errors drawn anew, up or down alike.

    An error (in the logarithm, for `huber`) is that of the law fitted to all other runs (El Karoui & Purdom 2018): a
    fit draws itself towards each run, and one of medians, which Huber's function far below the noise makes of it, goes
    through as many as it has coefficients, so that residuals are too small. It holds the noise of the others' law too,
    which scales it by sqrt(points / (points - coefficients)) where squares are fitted, and is scaled back. A run takes
    the error of one of those near it in size and tokens, sqrt(points) of them (a local bootstrap, Shi 1991), so that
    some may be noisier than others. Either sign is as likely, as in the wild bootstrap of medians (Feng, He & Hu 2011).
    """
    points, size = len(problem.loss_N), len(theta_P)
    weight_BN = 1 - np.eye(points)
    others = minimize(problem, np.tile(theta_P, (points, 1)), weight_BN=weight_BN)
    others = settle(problem, others, weight_BN=weight_BN)
    without_N = np.diagonal(problem.predict(others.theta_BP))
    law_N = problem.predict(theta_P[None])[0]
    near_NM = _nearest(problem.design_KNP, round(points**0.5))
    from_BN = near_NM[np.arange(points), rng.integers(near_NM.shape[1], size=(number, points))]
    scale_BN = rng.choice([-1.0, 1.0], (number, points)) * np.sqrt(1 - size / points)
    if problem.residual == "huber":
        return law_N * np.exp(scale_BN * np.log(problem.loss_N / without_N)[from_BN])
    return law_N + scale_BN * (problem.loss_N - without_N)[from_BN]


def _nearest(design_KNP: np.ndarray, number: int) -> np.ndarray:
    """The points nearest to each, itself among them, [points, number]: in what slopes multiply, each to one scale."""
    place_NX = np.concatenate(list(design_KNP), axis=1)
    spread_X = place_NX.std(axis=0)
    place_NX = place_NX[:, spread_X > 0] / spread_X[spread_X > 0]
    far_NN = np.sum((place_NX[:, None] - place_NX) ** 2, axis=-1)
    return np.argsort(far_NN, axis=1, kind="stable")[:, :number]


def refit(problem: Problem, start_SP: np.ndarray, loss_BN: np.ndarray) -> Minimum:
    """The best of the descents from every start, for each row of losses: fields [rows, ...]."""
    rows, starts = len(loss_BN), len(start_SP)
    found = minimize(problem, np.tile(start_SP, (rows, 1)), np.repeat(loss_BN, starts, axis=0))
    best = np.argmin(found.objective_B.reshape(rows, starts), axis=1) + starts * np.arange(rows)
    return settle(problem, Minimum(*(field[best] for field in found)), loss_BN)


def settle(
    problem: Problem, found: Minimum, loss_BN: np.ndarray | None = None, weight_BN: np.ndarray | None = None
) -> Minimum:
    """The same with rows that have not converged carried on, at most ROUNDS times, from where they are.

    Where the best E is 0, its logarithm falls without end along a valley whose curvature falls with it: pairs
    remembered from its upper part mislead there, and a descent that starts anew is through in a few hundred turns.
    """
    found = Minimum(*(field.copy() for field in found))
    for _ in range(ROUNDS):
        rows = np.flatnonzero(found.gradient_B > FLAT)
        if not len(rows):
            break
        losses, weights = (None if array_BN is None else array_BN[rows] for array_BN in (loss_BN, weight_BN))
        on = minimize(problem, found.theta_BP[rows], losses, weights)
        on = on._replace(turns_B=found.turns_B[rows] + on.turns_B)
        lower = on.objective_B <= found.objective_B[rows]
        for field, newer in zip(found, on):
            field[rows[lower]] = newer[lower]
    return found


def _agree(objective_B: np.ndarray, best: float, problem: Problem) -> int:
    # Points on the law itself leave an objective of about 0: what is 0 to the eye of a relative difference?
    floor = 1e-12 * len(objective_B) * (problem.delta if problem.residual == "huber" else 1.0)
    return int(np.sum(objective_B <= best * (1 + SAME) + floor))


def _percentiles(values: np.ndarray | None, level: float) -> tuple[float, float]:
    if values is None or not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, ends(level))
    return float(low), float(high)


def ends(level: float) -> tuple[float, float]:
    """The percentiles between which the middle share `level` of all values lies."""
    return 50 * (1 - level), 50 * (1 + level)

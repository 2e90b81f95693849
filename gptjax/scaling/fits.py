"""Fits of a law to runs: coefficients, bootstrap intervals, predictions with intervals.

    fitted = fit_law(CHINCHILLA, N, D, loss, bootstraps=1000)
    fitted.law                                       # laws.Chinchilla(E, A, B, alpha, beta)
    fitted.interval("alpha")                         # (low, high)
    fitted.predict(1e9, 2e10)                        # (loss, low, high) of a new run
    fitted.of(lambda law: law.optimal(1e21)[0])      # (N_opt, low, high)
    Fitted.of_record(json.loads(json.dumps(fitted.record())))  # an equal object

The parametric fit is that of Hoffmann et al. 2022 (section 3.3): Huber's function of width 1e-3 on log prediction - log
loss, minimized by L-BFGS from a grid of 4,500 starts (each law has its own: families.py), all for 15 turns and the 256
lowest to the end. The objective is summed over runs: an average is so small that an optimizer's default tolerance stops
it early (Besiroglu et al. 2024, section 4). Here a descent stops by its gradient, and continues until then (`settle`).

Intervals are percentiles of fits to redrawn losses (`redraw`) at the same sizes and token counts. Resampling whole runs
would give a worse design than the one that was run, and intervals that are too wide with few runs a coefficient
(El Karoui & Purdom 2018): 1.2 times the true scatter at 80 runs, 1.5 times at 30, measured with noise of ten times
Huber's width. Fits to redrawn losses start from the optimum of the true ones and from the 4 lowest starts of the grid.
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
SCREEN = 15  # turns after which only the FINAL lowest starts of a grid go on
FINAL = 256
NEAR = 4  # starts of the grid for a resample, beside the optimum of all points
FLAT = 1e-5  # largest gradient of a converged descent: see descent.Minimum
ROUNDS = 4  # restarts of a descent that has not converged
SAME = 1e-6  # objectives that differ by less, relatively, are one optimum
NO_FLOOR = 1e-3  # an E below this share of the least loss counts as 0


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A law fitted to runs, and its samples from redrawn losses.

    law: one of KINDS with float coefficients.
    inputs: the law's inputs by name (Family.inputs), each of shape [points]; loss [points] in nats a token.
    samples: coefficient -> array [bootstraps]; empty without bootstraps, or where they are impossible.
    objective: the minimized sum over the points; gradient: its largest entry there, scaled as in descent.Minimum (1e-8
    is converged). starts: descents carried to the end; agreed: the number that ended in this optimum. unconverged:
    bootstraps whose gradient stayed above 1e-5; they are kept in the samples.
    notes: caveats, one sentence each; show all of them.
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
        """(value, low, high) of any function of the law, such as lambda law: law.exponents[0]."""
        values = np.ravel(function(self.sampled)) if self.samples else None
        return (float(np.squeeze(function(self.law))), *_percentiles(values, self.level))

    def predict(self, *inputs, new_run: bool = True, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss, low, high) at the law's inputs (N, D, perhaps U; C for a PowerLaw), arrays of their shape.

        The interval is for a new run's loss: each bootstrap's law, times the scatter of the fitted points about the
        law. With new_run=False it is for the law alone, which more runs narrow without end. It does not cover errors of
        extrapolation. NaN without bootstraps.
        """
        arrays = [np.atleast_1d(np.asarray(x, float)) for x in inputs]
        loss = self.law.loss(*arrays)
        if not self.samples:
            return loss, np.full_like(loss, np.nan), np.full_like(loss, np.nan)
        draws = self.sampled.loss(*arrays)
        if new_run:
            size = len(self.coefficients)
            wider = np.sqrt(len(self.loss) / max(len(self.loss) - size, 1))  # a fit uses `size` degrees of freedom
            draws = draws * np.exp(wider * np.random.default_rng(seed).choice(self.residuals, draws.shape))
        low, high = np.percentile(draws, ends(self.level), axis=0)
        return loss, low, high

    def record(self) -> dict[str, Any]:
        """The fit as plain JSON values."""
        arrays = {"loss": self.loss.tolist(), "samples": {k: v.tolist() for k, v in self.samples.items()}}
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"notes": list(self.notes)}
        inputs = {k: v.tolist() for k, v in self.inputs.items()}
        return rest | arrays | {"law": type(self.law).__name__, "inputs": inputs, "coefficients": self.coefficients}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Fitted":
        """The inverse of `record`; raises InputError where a part is missing or the law is unknown."""
        try:
            values = {f.name: record[f.name] for f in dataclasses.fields(cls)}
            values["law"] = KINDS[record["law"]](**record["coefficients"])
        except (KeyError, TypeError) as error:
            raise InputError(f"not the record of a fit: {error}; wanted what gptjax fit wrote") from None
        for name in ("inputs", "samples"):
            values[name] = {k: np.asarray(v, float) for k, v in record[name].items()}
        return cls(**values | {"loss": np.asarray(record["loss"], float), "notes": tuple(record["notes"])})


def fit_law(
    family: Family, *columns, delta: float = 1e-3, bootstraps: int = 0, seed: int = 0, level: float = 0.95
) -> Fitted:
    """Fits a law to its inputs and, last, the losses in nats a token, each [points].

    Raises InputError for arrays that differ in length, values that are not finite and above 0, fewer points than
    coefficients, inputs that can't determine them (Family.check), and a coefficient on which no loss depends.
    """
    named = dict(zip((*family.inputs, "loss"), (np.asarray(x, float) for x in columns), strict=True))
    check_columns(named, family.size)
    *inputs, loss = named.values()
    family.check(*inputs)
    problem, starts = family.problem(*inputs, loss, delta=delta), family.starts
    if not 0 < level < 1:
        raise InputError(f"level={level}: wanted a number between 0 and 1, such as 0.95")
    minimum = _descend_grid(problem, starts)
    best = int(np.argmin(minimum.objective_B))
    theta_P, points, size = minimum.theta_BP[best], len(loss), family.size
    agreed = _agree(minimum.objective_B, minimum.objective_B[best], problem)
    law = family.law(*theta_P)
    law = type(law)(**{k: float(v) for k, v in dataclasses.asdict(law).items()})
    _check_identified(law, inputs)

    notes = []
    if minimum.gradient_B[best] > FLAT:
        notes.append(f"The fit has not converged: a gradient of {minimum.gradient_B[best]:.1e} is left.")
    if agreed < 2:
        notes.append(
            f"Only one of the {len(minimum.turns_B)} best starts ended in the optimum: there may be a lower one."
        )
    samples, unconverged = {}, 0
    if bootstraps and points == size:
        notes.append(f"{points} points fit {size} coefficients exactly: there are no intervals.")
    elif bootstraps:
        if points < 2 * size:
            notes.append(f"{points} points for {size} coefficients: the intervals are rough at best.")
        redrawn = redraw(problem, theta_P, bootstraps, np.random.default_rng(seed))
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
    no_floor_B = floor_B < NO_FLOOR * loss.min()
    if no_floor_B.sum() > (1 - level) / 2 * len(no_floor_B):
        what = "the fit" if no_floor_B[-1] else f"{no_floor_B.sum()} of {len(no_floor_B) - 1} resamples"
        notes.append(
            f"E is 0 in {what}: these runs do not determine the irreducible loss. Larger budgets would; "
            "far beyond the runs, predictions are rough."
        )
    return Fitted(
        law, dict(zip(family.inputs, inputs)), loss, samples, float(minimum.objective_B[best]),
        float(minimum.gradient_B[best]), len(minimum.turns_B), agreed, unconverged, level, tuple(notes),
    )  # fmt: skip


def check_columns(columns: dict[str, np.ndarray], coefficients: int = 0) -> None:
    """Raises InputError unless each column has a finite number above 0 for each loss, and there are enough."""
    for name, values in columns.items():
        if values.ndim != 1 or len(values) != len(columns["loss"]):
            raise InputError(f"{name} has the shape {values.shape}: wanted one number for each loss")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise InputError(f"{name}={values[bad[0]]:g} at point {bad[0]}: wanted a finite number above 0")
    if (points := len(columns["loss"])) < coefficients:
        raise InputError(f"{points} points for the {coefficients} coefficients of the law: wanted at least as many")


def _check_identified(law: Any, inputs: Sequence[np.ndarray]) -> None:
    """Raises InputError for a coefficient without effect on any loss, such as R_N where no run has too large an N."""
    for name in dataclasses.asdict(law):
        with np.errstate(all="ignore"):
            others = [dataclasses.replace(law, **{name: value}).loss(*inputs) for value in (1.0, 2.0)]
        if all(np.array_equal(other, law.loss(*inputs)) for other in others):
            raise InputError(
                f"no loss of these {len(inputs[0])} runs depends on {name} of the law fitted to them: wanted some that "
                "do, or a law without it"
            )


def _descend_grid(problem: Problem, start_SP: np.ndarray) -> Minimum:
    """Descends briefly from every start, then to the end from the FINAL lowest; the best one until it converges."""
    first = minimize(problem, start_SP, turns=SCREEN)
    lowest = np.argsort(first.objective_B)[:FINAL]
    minimum = minimize(problem, first.theta_BP[lowest])
    if minimum.gradient_B[np.argmin(minimum.objective_B)] > FLAT:
        minimum = settle(problem, minimum)
    return minimum


def neighbours(problem: Problem, start_SP: np.ndarray) -> np.ndarray:
    """The NEAR starts of the grid with the lowest objective, without a descent."""
    at_start = minimize(problem, start_SP, turns=0)
    return start_SP[np.argsort(at_start.objective_B)[:NEAR]]


def redraw(problem: Problem, theta_P: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Redrawn losses of the runs, [number, points]: the law's, with resampled errors of random sign.

    The error of a run (in the logarithm, for `huber`) is that of the law fitted to all other runs (El Karoui & Purdom
    2018). Residuals would be too small: a fit is drawn towards each run, and a fit of medians, to which Huber's
    function far below the noise amounts, goes through as many runs as it has coefficients. That error includes the
    noise of the others' law, by a factor sqrt(points / (points - coefficients)) for squares, which is divided out. A
    run takes the error of one of its sqrt(points) nearest runs in size and tokens (a local bootstrap, Shi 1991), so
    that noise may vary. Signs are random, as in the wild bootstrap of medians (Feng, He & Hu 2011).
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
    """The nearest points of each, itself included, [points, number], by the normalized factors of the slopes."""
    place_NX = np.concatenate(list(design_KNP), axis=1)
    spread_X = place_NX.std(axis=0)
    place_NX = place_NX[:, spread_X > 0] / spread_X[spread_X > 0]
    far_NN = np.sum((place_NX[:, None] - place_NX) ** 2, axis=-1)
    return np.argsort(far_NN, axis=1, kind="stable")[:, :number]


def refit(problem: Problem, start_SP: np.ndarray, loss_BN: np.ndarray) -> Minimum:
    """The lowest of the descents from every start, for each row of losses: fields [rows, ...]."""
    rows, starts = len(loss_BN), len(start_SP)
    minimum = minimize(problem, np.tile(start_SP, (rows, 1)), np.repeat(loss_BN, starts, axis=0))
    best = np.argmin(minimum.objective_B.reshape(rows, starts), axis=1) + starts * np.arange(rows)
    return settle(problem, Minimum(*(field[best] for field in minimum)), loss_BN)


def settle(
    problem: Problem, minimum: Minimum, loss_BN: np.ndarray | None = None, weight_BN: np.ndarray | None = None
) -> Minimum:
    """Restarts rows that have not converged from where they ended, at most ROUNDS times.

    Where the best E is 0, its logarithm falls without end along a valley of falling curvature: the kept pairs of L-BFGS
    from its upper part mislead there, and a restarted descent converges in a few hundred turns.
    """
    minimum = Minimum(*(field.copy() for field in minimum))
    for _ in range(ROUNDS):
        rows = np.flatnonzero(minimum.gradient_B > FLAT)
        if not len(rows):
            break
        losses, weights = (None if array_BN is None else array_BN[rows] for array_BN in (loss_BN, weight_BN))
        on = minimize(problem, minimum.theta_BP[rows], losses, weights)
        on = on._replace(turns_B=minimum.turns_B[rows] + on.turns_B)
        lower = on.objective_B <= minimum.objective_B[rows]
        for field, newer in zip(minimum, on):
            field[rows[lower]] = newer[lower]
    return minimum


def _agree(objective_B: np.ndarray, best: float, problem: Problem) -> int:
    # Points on the law itself leave an objective of about 0, where relative differences mean nothing.
    floor = 1e-12 * len(objective_B) * (problem.delta if problem.residual == "huber" else 1.0)
    return int(np.sum(objective_B <= best * (1 + SAME) + floor))


def _percentiles(values: np.ndarray | None, level: float) -> tuple[float, float]:
    if values is None or not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, ends(level))
    return float(low), float(high)


def ends(level: float) -> tuple[float, float]:
    """The percentiles of the central interval at `level`."""
    return 50 * (1 - level), 50 * (1 + level)

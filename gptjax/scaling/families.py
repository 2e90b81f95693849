"""The laws that can be fitted, one Family each, for fits, predictions and reports.

A new law is a Family in FAMILIES and in FitConfig.law, with its class in laws.py and in fits.KINDS.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.section import InputError
from gptjax.scaling.descent import Problem, log_sum
from gptjax.scaling.laws import Chinchilla, DataConstrained, Kaplan, OverTraining, PowerLaw

DIFFERENT = 3  # values of an input that determine its exponent


@dataclass(frozen=True)
class Family:
    """A law whose coefficients are to be fitted.

    inputs: the arguments of its loss, N, D, U (unique tokens) or C. law: constructor from the P fitted numbers, floats
    or arrays. terms: function of the inputs to K rows of P slopes (see descent.py): arrays [points], or one number for
    all. axes: the grid of starts, one axis for each fitted number. check: raises InputError for inputs that can't
    determine the coefficients. residual, combine: see descent.Problem. no_powers: the reason why the optimal N and D
    are not fitted powers of C; empty where the law has `exponents`.
    """

    formula: str
    inputs: tuple[str, ...]
    law: Callable[..., Any]
    terms: Callable[..., list[list[Any]]]
    axes: tuple[Iterable[float], ...]
    check: Callable[..., None]
    residual: Literal["huber", "squares"] = "huber"
    combine: Callable[..., jax.Array] = log_sum
    no_powers: str = ""

    @property
    def size(self) -> int:
        """The number of fitted coefficients."""
        return len(self.axes)

    @property
    def starts(self) -> np.ndarray:
        """All points of the grid, [starts, P]."""
        return np.array(list(itertools.product(*self.axes)), float)

    def problem(self, *columns: np.ndarray, delta: float) -> Problem:
        """The problem that a fit minimizes, from the inputs and then the losses, each [points]."""
        *inputs, loss = columns
        slopes = [[np.broadcast_to(x, loss.shape) for x in row] for row in self.terms(*inputs)]
        return Problem(np.moveaxis(np.array(slopes, float), 1, 2), loss, self.residual, delta, self.combine, (*inputs,))


def different(**inputs: np.ndarray) -> None:
    """Raises InputError where an input has too few different values."""
    for name, values in inputs.items():
        if (count := len(np.unique(values))) < DIFFERENT:
            raise InputError(f"{name} has {count} different values: wanted at least {DIFFERENT} to fit an exponent")


def spread(N: np.ndarray, D: np.ndarray) -> None:
    """Raises InputError unless there are several budgets, sizes and token counts."""
    if (N * D).max() < 1.1 * (N * D).min():
        raise InputError(f"all {len(N)} points have one budget (N D = {N[0] * D[0]:.3g}): wanted several to fit a law")
    different(N=N, D=D)


def spread_and_repeated(N: np.ndarray, D: np.ndarray, U: np.ndarray) -> None:
    """Raises InputError unless runs of one epoch determine Chinchilla's law, and other runs repeat their tokens."""
    new = D <= U
    if new.all():
        raise InputError(f"none of {len(N)} runs repeats its tokens (D > U): wanted runs of several epochs too")
    if new.sum() < CHINCHILLA.size:
        raise InputError(
            f"{new.sum()} runs of one epoch or less (D <= U): wanted at least {CHINCHILLA.size}, which determine the "
            "law of new tokens"
        )
    try:
        spread(N[new], D[new])
    except InputError as e:
        raise InputError(f"of the {new.sum()} runs of one epoch or less, {e}") from None


CHINCHILLA = Family(
    formula="L(N, D) = E + A / N^alpha + B / D^beta",
    inputs=("N", "D"),
    law=lambda a, b, e, alpha, beta: Chinchilla(np.exp(e), np.exp(a), np.exp(b), alpha, beta),
    terms=lambda N, D: [[1, 0, 0, -np.log(N), 0], [0, 1, 0, 0, -np.log(D)], [0, 0, 1, 0, 0]],
    axes=(*[np.arange(0, 30, 5)] * 2, np.arange(-1, 1.5, 0.5), *[np.arange(0, 2.5, 0.5)] * 2),  # theirs: appendix D
    check=spread,
)

OVERTRAINING = Family(
    formula="L(N, D) = E + a N^e + b 6^(e/2) D^e",
    inputs=("N", "D"),
    law=lambda a, b, E, e: OverTraining(np.exp(E), np.exp(a), np.exp(b), e),
    terms=lambda N, D: [[1, 0, 0, np.log(N)], [0, 1, 0, np.log(6) / 2 + np.log(D)], [0, 0, 1, 0]],
    axes=(*[np.log([1e2, 3e2, 1e3, 3e3])] * 2, np.log([0.1, 1, 2, 10]), (-0.1, -0.3)),  # as released
    check=spread,
    residual="squares",
    no_powers="this law has one exponent, so its N-opt and D-opt grow alike, as C^0.5, by assumption",
)

POWER = Family(
    formula="L(C) = E + K / C^gamma",
    inputs=("C",),
    law=lambda K, E, gamma: PowerLaw(np.exp(E), np.exp(K), gamma),
    terms=lambda C: [[1, 0, -np.log(C)], [0, 1, 0]],
    axes=(np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5), (0.0, 0.05, 0.1, 0.2, 0.4)),
    check=lambda C: different(C=C),
)


def soft_maximum(log_terms, theta_BP, inputs):
    """Kaplan's law: a soft maximum of alpha_N log(N_c / N) and alpha_D log(D_c / D), with temperature alpha_D."""
    alpha_B1 = jnp.where(theta_BP[:, 3:] > 0, theta_BP[:, 3:], jnp.nan)  # below 0 it is a soft minimum
    return alpha_B1 * log_sum([term_BN / alpha_B1 for term_BN in log_terms], theta_BP, inputs)


KAPLAN = Family(
    formula="L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
    inputs=("N", "D"),
    law=lambda n, d, alpha_N, alpha_D: Kaplan(alpha_N, alpha_D, np.exp(n / alpha_N), np.exp(d / alpha_D)),
    terms=lambda N, D: [[1, 0, -np.log(N), 0], [0, 1, 0, -np.log(D)]],
    axes=(*[np.arange(0, 10, 2)] * 2, *[(0.05, 0.1, 0.2, 0.4)] * 2),
    check=spread,
    combine=soft_maximum,
)


def of_effective(log_terms, theta_BP, inputs):
    """Chinchilla's law of effective parameters and tokens (laws.DataConstrained), in logarithms."""
    a, b, _, alpha, beta, half_D, half_N = (x_B[:, None] for x_B in theta_BP.T)
    N, D = jnp.log(inputs[0]), jnp.log(inputs[1])
    U = jnp.minimum(jnp.log(inputs[2]), D)
    G = (jnp.log(alpha) - jnp.log(beta) + a - b) / (alpha + beta)
    U_N = jnp.minimum(N, (U + G) * beta / alpha + G)
    of_N, of_D, floor = log_terms
    return log_sum([of_N + alpha * _lost(N, U_N, half_N), of_D + beta * _lost(D, U, half_D), floor], theta_BP, inputs)


def _lost(trained, unique, half):
    """log trained - log effective, of all three as logarithms."""
    repeats = jnp.expm1(jnp.minimum(trained - unique, 100.0))  # clipped to stay finite: a start may have any U_N
    return trained - unique - jnp.log1p(-jnp.exp(half) * jnp.expm1(-repeats * jnp.exp(-half)))


# Muennighoff et al. fit Chinchilla's five to runs of one epoch, fix them, and fit R_D and R_N to the others. Here all
# seven are fitted to all runs at once, so that the intervals of R_D and R_N include the uncertainty of the five.
DATA_CONSTRAINED = Family(
    formula="L(N, D, U) = E + A / N'^alpha + B / D'^beta, D' = U (1 + R_D (1 - exp((1 - D/U) / R_D))), N' likewise of "
    "the best N for U",
    inputs=("N", "D", "U"),
    law=lambda a, b, e, alpha, beta, half_D, half_N: DataConstrained(
        np.exp(e), np.exp(a), np.exp(b), alpha, beta, np.exp(half_D), np.exp(half_N)
    ),
    terms=lambda N, D, U: [[*row, 0, 0] for row in CHINCHILLA.terms(N, D)],
    axes=(*[np.arange(0, 20, 5)] * 2, (0.0, 0.5), *[(0.2, 0.5, 1.0)] * 2, (0.0, 3.0), (0.0, 3.0)),
    check=spread_and_repeated,
    combine=of_effective,
)

FAMILIES = {
    "chinchilla": CHINCHILLA,
    "overtraining": OVERTRAINING,
    "kaplan": KAPLAN,
    "data_constrained": DATA_CONSTRAINED,
}

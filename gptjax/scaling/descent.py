"""Batched L-BFGS for many small fits: every start and every resample is a lane of one batch, in JAX and float64.

A model consists of terms whose logarithms are linear in its P parameters: term k of point n is
exp(design_KNP[k, n] . theta_P). Each term has its own intercept (parameter k); the other parameters are slopes, or not
in the terms. A prediction is the sum over the K terms, or another function `combine` of them. Chinchilla's law is such
a sum, with (A, B, E) as intercepts.

Lanes don't wait for each other: a turn evaluates every lane once, at its own step along its own direction; a lane whose
step is accepted moves on, any other shortens its step.
Letters: B lanes, K terms, N points, P parameters, M pairs remembered.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128  # of one call, so that its arrays stay in the cache, and it ends with its own lanes
POINTS = 16  # points are padded to a multiple, with weight 0, so that tables of similar length share a compilation
MEMORY = 8
TOLERANCE = 1e-8  # of the gradient's largest entry: see Minimum
SHORTEST_STEP = 1e-11  # below this length the objective no longer changes


def log_sum(log_terms: Sequence[jax.Array], theta_BP: jax.Array, inputs: Sequence[jax.Array]) -> jax.Array:
    """Log of the sum of terms given by their logarithms, each [B, N]; a `combine` of Problem."""
    top_BN = jax.lax.stop_gradient(jax.tree.reduce(jnp.maximum, log_terms))
    return top_BN + jnp.log(sum(jnp.exp(u_BN - top_BN) for u_BN in log_terms))


class Problem(NamedTuple):
    """Points, and the objective of a prediction of them.

    `huber`: Huber's function of width delta on log prediction - log loss. `squares`: half the squared difference of
    prediction and loss. combine(log_terms, theta_BP, inputs) is the log prediction [B, N] in JAX; it must be a module's
    function, so that jit caches it. `inputs`, each [N] and above 0, are its other arguments. No step is accepted where
    it is NaN.
    """

    design_KNP: np.ndarray
    loss_N: np.ndarray
    residual: Literal["huber", "squares"]
    delta: float
    combine: Callable[..., jax.Array] = log_sum
    inputs: tuple[np.ndarray, ...] = ()

    def predict(self, theta_BP: np.ndarray) -> np.ndarray:
        """The predicted losses for each row of parameters, [B, N]."""
        with jax.enable_x64(True):
            return np.exp(np.asarray(_log_predictions(theta_BP, self.design_KNP, self.inputs, self.combine)))


@partial(jax.jit, static_argnames="combine")
def _log_predictions(theta_BP, design_KNP, inputs, combine):
    return combine([theta_BP @ term_NP.T for term_NP in design_KNP], theta_BP, inputs)


class Minimum(NamedTuple):
    """The end of each lane: parameters, the objective as a sum over points, the remaining gradient, turns taken.

    The gradient is that of the mean over points, divided by delta for `huber` (so its largest possible entry is about
    1), in coordinates where slopes are in units of one standard deviation of their factor.
    """

    theta_BP: np.ndarray
    objective_B: np.ndarray
    gradient_B: np.ndarray
    turns_B: np.ndarray


def minimize(
    problem: Problem, start_BP: np.ndarray, loss_BN: np.ndarray | None = None, weight_BN: np.ndarray | None = None,
    turns: int = 600,
) -> Minimum:  # fmt: skip
    """Minimizes from every row of start_BP, for at most `turns` turns.

    loss_BN: losses of each row instead of the problem's. weight_BN: weights of each row's points instead of 1.
    """
    basis_PP = _coordinates(problem.design_KNP)
    scale = len(problem.loss_N) * (problem.delta if problem.residual == "huber" else 1.0)
    start_BP = np.linalg.solve(basis_PP, start_BP.T).T
    shape = (len(start_BP), len(problem.loss_N))
    loss_BN = np.broadcast_to(problem.loss_N if loss_BN is None else loss_BN, shape)
    weight_BN = np.broadcast_to(1.0 if weight_BN is None else weight_BN, shape)
    lanes = -(-len(start_BP) // LANES) * LANES
    pad = np.arange(lanes) % len(start_BP)
    more = (0, -len(problem.loss_N) % POINTS)
    design_KNP = np.pad(problem.design_KNP @ basis_PP, ((0, 0), more, (0, 0)))
    inputs = tuple(np.pad(input_N, more, constant_values=1.0) for input_N in problem.inputs)

    def part(begin: int) -> tuple[np.ndarray, ...]:
        rows = pad[begin : begin + LANES]
        with jax.enable_x64(True):  # thread-local, so that no other arrays change type
            weights = np.pad(np.asarray(weight_BN[rows], float), ((0, 0), more))
            losses = np.pad(np.asarray(loss_BN[rows], float), ((0, 0), more), constant_values=1.0)
            points = (weights, design_KNP, losses, basis_PP, inputs)
            how = {"residual": problem.residual, "combine": problem.combine}
            out = _descend(start_BP[rows], *points, problem.delta, scale, turns, **how)
            return tuple(np.asarray(x) for x in out)

    with ThreadPoolExecutor() as pool:
        parts = [np.concatenate(x)[: len(start_BP)] for x in zip(*pool.map(part, range(0, lanes, LANES)))]
    phi_BP, value_B, gradient_B, turns_B = parts
    return Minimum(phi_BP @ basis_PP.T, value_B * scale, gradient_B, turns_B)


def _coordinates(design_KNP: np.ndarray) -> np.ndarray:
    """A basis with scaled slopes and with a term's mean height as intercept: theta = basis_PP @ phi.

    Otherwise A and alpha of a law nearly cancel along a line, which takes many turns to follow.
    """
    terms, _, size = design_KNP.shape
    basis_PP = np.eye(size)
    for slope in range(terms, size):
        spread = design_KNP[:, :, slope].std(axis=1).max() or 1.0
        basis_PP[slope, slope] = 1 / spread
        basis_PP[:terms, slope] = -design_KNP[:, :, slope].mean(axis=1) / spread
    return basis_PP


@partial(jax.jit, static_argnames=("residual", "combine"))
def _descend(phi_BP, weight_BN, design_KNP, loss_BN, basis_PP, inputs, delta, scale, turns, *, residual, combine):
    def log_prediction(phi_BP):
        return combine([phi_BP @ term_NP.T for term_NP in design_KNP], phi_BP @ basis_PP.T, inputs)

    value_and_gradient = partial(
        _objective, log_prediction, weight_BN=weight_BN, loss_BN=loss_BN, delta=delta, scale=scale, kind=residual
    )
    value_B, gradient_BP = value_and_gradient(phi_BP)
    lanes, size = phi_BP.shape
    empty = jnp.zeros((MEMORY, lanes, size))
    state = {
        "phi": phi_BP, "value": value_B, "gradient": gradient_BP, "steps": empty, "changes": empty,
        "direction": -gradient_BP, "length": 1 / jnp.maximum(1.0, _largest(gradient_BP)),
        "done": _largest(gradient_BP) < TOLERANCE, "turns": jnp.zeros(lanes, int),
    }  # fmt: skip

    def turn(carry):
        i, old = carry
        step_BP = old["length"][:, None] * old["direction"]
        value_B, gradient_BP = value_and_gradient(old["phi"] + step_BP)
        slope_B = _dot(step_BP, old["gradient"])
        # Near the end the objective's rounding exceeds its decrease, so a rise of that size is accepted.
        good_B = (value_B <= old["value"] + 1e-4 * slope_B + 1e-15 * jnp.abs(old["value"])) & ~old["done"]
        moved = _moved(old, step_BP, value_B, gradient_BP)
        # The minimum of the parabola through both values and the slope, clipped to [0.1, 0.5].
        shorter_B = jnp.clip(-slope_B / (2 * (value_B - old["value"] - slope_B)), 0.1, 0.5)
        shorter_B = jnp.where(jnp.isfinite(shorter_B), shorter_B, 0.1) * old["length"]
        stuck_B = ~good_B & (_largest(old["direction"]) * shorter_B < SHORTEST_STEP)
        kept = old | {"length": shorter_B, "done": stuck_B}
        new = {k: jnp.where(_like(good_B, moved[k], k), moved[k], kept[k]) for k in moved}
        new = {k: jnp.where(_like(old["done"], new[k], k), old[k], new[k]) for k in new}
        return i + 1, new | {"turns": jnp.where(old["done"], old["turns"], i + 1)}

    def going(carry):
        i, now = carry
        return (i < turns) & ~jnp.all(now["done"])

    _, end = jax.lax.while_loop(going, turn, (0, state))
    return end["phi"], end["value"], _largest(end["gradient"]), end["turns"]


def _objective(log_prediction, phi_BP, *, weight_BN, loss_BN, delta, scale, kind):
    """Value and gradient of each lane; lanes are independent, so one backward pass serves them all."""
    log_prediction_BN, pull_back = jax.vjp(log_prediction, phi_BP)
    if kind == "huber":
        error_BN = log_prediction_BN - jnp.log(loss_BN)
        pull_BN = jnp.clip(error_BN, -delta, delta)
        value_BN, chain_BN = pull_BN * (error_BN - pull_BN / 2), 1.0
    else:
        chain_BN = jnp.exp(jnp.minimum(log_prediction_BN, 300.0))  # its square must be finite
        pull_BN = chain_BN - loss_BN
        value_BN = pull_BN**2 / 2
    value_B = jnp.sum(weight_BN * value_BN, axis=1) / scale
    (gradient_BP,) = pull_back(weight_BN * pull_BN * chain_BN / scale)
    return value_B, gradient_BP


def _moved(old: dict[str, Any], step_BP, value_B, gradient_BP) -> dict[str, Any]:
    """The state after an accepted step: its pair is kept where the objective curved upward, and a new direction."""
    change_BP = gradient_BP - old["gradient"]
    curved_B = _dot(step_BP, change_BP) > 1e-12 * jnp.sqrt(_dot(step_BP, step_BP) * _dot(change_BP, change_BP))
    pairs = {}
    for name, newest in (("steps", step_BP), ("changes", change_BP)):
        pushed = jnp.concatenate([newest[None], old[name][:-1]])
        pairs[name] = jnp.where(curved_B[None, :, None], pushed, old[name])
    direction_BP = -_two_loops(gradient_BP, pairs["steps"], pairs["changes"])
    uphill_B = _dot(direction_BP, gradient_BP) > -1e-14 * _dot(gradient_BP, gradient_BP)
    direction_BP = jnp.where(uphill_B[:, None], -gradient_BP, direction_BP)
    has_pairs_B = jnp.any(pairs["steps"][0] != 0, axis=1) & ~uphill_B
    return {
        "phi": old["phi"] + step_BP, "value": value_B, "gradient": gradient_BP, "direction": direction_BP,
        "length": jnp.where(has_pairs_B, 1.0, 1 / jnp.maximum(1.0, _largest(gradient_BP))),
        "done": _largest(gradient_BP) < TOLERANCE, "turns": old["turns"],
    } | pairs  # fmt: skip


def _two_loops(gradient_BP, steps_MBP, changes_MBP):
    """The inverse Hessian of the kept pairs, newest first, times the gradient (Nocedal 1980)."""
    curve_MB = jnp.sum(steps_MBP * changes_MBP, axis=-1)
    inverse_MB = jnp.where(curve_MB > 0, 1 / jnp.where(curve_MB > 0, curve_MB, 1.0), 0.0)
    q_BP, weights = gradient_BP, []
    for s_BP, y_BP, inverse_B in zip(steps_MBP, changes_MBP, inverse_MB):
        weights.append(inverse_B * _dot(s_BP, q_BP))
        q_BP = q_BP - weights[-1][:, None] * y_BP
    newest_B = _dot(changes_MBP[0], changes_MBP[0])
    q_BP = q_BP * jnp.where(newest_B > 0, curve_MB[0] / jnp.where(newest_B > 0, newest_B, 1.0), 1.0)[:, None]
    for s_BP, y_BP, inverse_B, a_B in reversed(list(zip(steps_MBP, changes_MBP, inverse_MB, weights))):
        q_BP = q_BP + (a_B - inverse_B * _dot(y_BP, q_BP))[:, None] * s_BP
    return q_BP


def _dot(a_BP, b_BP):
    return jnp.sum(a_BP * b_BP, axis=-1)


def _largest(a_BP):
    return jnp.max(jnp.abs(a_BP), axis=-1)


def _like(flag_B, array, name):
    """The lanes' flags in the shape of a field of the state."""
    if name in ("steps", "changes"):
        return flag_B[None, :, None]
    return flag_B if array.ndim == 1 else flag_B[:, None]

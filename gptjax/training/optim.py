"""Schedules and optimizers. The letters of a parameter's name decide how an optimizer treats it.

Dimensions say nothing: the stacked norms `norm_attn_ND` have two and are vectors, `q_NDHK` has four and is a stack of
matrices, D x HK. Every array of an optimizer's state is named by its true letters, from which it is sharded.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.config import ModelConfig, OptimConfig
from gptjax.model.mup import rate_factor
from gptjax.parallel.sharding import matrix, suffix

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(cfg: OptimConfig, steps: int) -> Schedule:
    """Learning rate of update u = 0, 1, ..., for a run of `steps` updates.

    It rises as (u + 1) / w in the w = warmup_steps first updates; after them it is the peak times

        cosine    1 - (1 - f) (1 - cos(pi d)) / 2,  d = (u - w) / (steps - w)
        linear    1 - (1 - f) d
        wsd       1 - (1 - f) e,  e = the share done of the last decay_fraction of the steps (Hu et al. 2024, MiniCPM)
        constant  1
        rsqrt     sqrt(w / (u + 1))  (Vaswani et al. 2017)

    with f = final_fraction, which constant and rsqrt do not have, and d and e held between 0 and 1.
    """

    def schedule(u: jax.typing.ArrayLike) -> jax.Array:
        u = jnp.asarray(u, jnp.float32)
        rise = max(cfg.warmup_steps, 1)
        warm = jnp.minimum(1.0, (u + 1) / rise)
        done = jnp.clip((u - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 0, 1)
        if cfg.schedule == "rsqrt":
            return cfg.learning_rate * warm * jnp.sqrt(rise / jnp.maximum(u + 1, rise))
        if cfg.schedule == "cosine":
            fall = 0.5 * (1 - jnp.cos(jnp.pi * done))
        elif cfg.schedule == "linear":
            fall = done
        elif cfg.schedule == "wsd":
            length = cfg.decay_steps(steps)
            fall = jnp.clip((u - (steps - length)) / length, 0, 1)
        else:
            fall = 0.0
        return cfg.learning_rate * warm * (1 - (1 - cfg.final_fraction) * fall)

    return schedule


def decays(name: str) -> bool:
    """True for matrices. Norms, biases and positions do not decay."""
    return matrix(name) is not None and not {"T", "P"} & set(suffix(name))


def is_hidden(name: str) -> bool:
    """True for the matrices that map features to features: not the embedding, the head or the position table."""
    return decays(name) and "V" not in suffix(name)


def by_name(function: Callable[[str], Any], params: Any) -> Any:
    """The tree of function(name of the leaf) over parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(path[-1].key), params)


decay_mask = functools.partial(by_name, decays)  # the tree of `decays` over parameters


def make_optimizer(
    cfg: OptimConfig, schedule: Schedule, model: ModelConfig | None = None
) -> optax.GradientTransformation:
    """The optimizer optim.kind, after clipping the gradient to a global norm; with model.mup_base_width, under muP.

    Each kind gives a direction; what is added to the weights is -schedule (muP's factor x direction + decay x weights).

        adamw      Loshchilov & Hutter 2019
        lion       Chen et al. 2023; its learning rate is usually a tenth to a third of AdamW's, its decay higher
        adafactor  Shazeer & Stern 2018: see `scale_by_factored_rms`
        muon       Jordan et al. 2024 for `is_hidden` matrices, AdamW for the rest: see `scale_by_muon`
    """
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon)
    if cfg.kind == "adamw":
        direction = adam
    elif cfg.kind == "lion":
        direction = optax.scale_by_lion(cfg.beta1, cfg.beta2)
    elif cfg.kind == "adafactor":
        moment = [optax.ema(cfg.beta1)] if cfg.beta1 else []
        direction = optax.chain(scale_by_factored_rms(cfg.beta2, cfg.epsilon), *moment)
    else:
        label = functools.partial(by_name, lambda name: "muon" if is_hidden(name) else "adam")
        direction = optax.partition({"muon": scale_by_muon(cfg.momentum), "adam": adam}, label)

    if model is not None and model.mup_base_width:
        direction = _scale_by_name(direction, functools.partial(rate_factor, model, spectral=cfg.kind == "muon"))
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.chain(
            direction,
            optax.add_decayed_weights(cfg.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        ),
    )


def _scale_by_name(
    direction: optax.GradientTransformation, factor: Callable[[str], float]
) -> optax.GradientTransformation:
    """The direction with each leaf times the factor of its name."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = direction.update(updates, state, params)
        return jax.tree.map(jnp.multiply, updates, by_name(factor, updates)), state

    return optax.GradientTransformation(direction.init, update)


class FactoredState(NamedTuple):
    """Second moments of matrices as means over their outputs (row) and their inputs (column), of others in full."""

    count: jax.Array
    row: dict
    column: dict
    full: dict


def scale_by_factored_rms(beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adafactor's direction (Shazeer & Stern 2018, algorithm 4) for matrices by letters, for any other shape Adam's.

        R = mean of g^2 over the outputs, C = over the inputs, each a moving average; v = R C / mean(R)
        u = g / (sqrt(v) + epsilon), divided by max(1, RMS(u)) of its matrix

    The averages decay by min(beta2, 1 - t^-0.8) in update t (section 7.2, with a ceiling as in Zhai et al. 2022), which
    needs no correction of a bias. Learning rates are absolute, so that AdamW's carry over: the paper's relative steps,
    by RMS(weights), are left out, and its momentum follows as a transformation of its own.

    optax's goes by sizes: it factors over the two largest dimensions, in q_NDHK perhaps the layers, and keeps
    placeholders of shape (1,), which no letters describe.
    """

    def init(params: Any) -> FactoredState:
        row, column, full = {}, {}, {}
        for path, x in _flat(params).items():
            if matrix(path[-1]) is None:
                full[path] = jnp.zeros(x.shape, jnp.float32)
                continue
            for part, (name, axes) in zip((row, column), _parts(path[-1])):
                assert (*path[:-1], name) not in part, f"two parameters share the factor {name}; rename {path[-1]}"
                kept = [n for axis, n in enumerate(x.shape) if axis not in axes]
                part[(*path[:-1], name)] = jnp.zeros(kept, jnp.float32)
        return FactoredState(jnp.zeros((), jnp.int32), *map(unflatten_dict, (row, column, full)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        count = state.count + 1
        decay = jnp.minimum(beta2, 1 - count.astype(jnp.float32) ** -0.8)
        row, column, full = (_flat(part) for part in state[1:])
        directions = {}

        def average(part: dict, path: tuple, new: jax.Array) -> jax.Array:
            part[path] = decay * part[path] + (1 - decay) * new
            return part[path]

        for path, g in _flat(updates).items():
            squares = g.astype(jnp.float32) ** 2
            stack = len(suffix(path[-1])) - len(suffix(path[-1]).lstrip("NE"))
            if matrix(path[-1]) is None:
                v = average(full, path, squares)
            else:
                (row_name, outputs), (column_name, inputs) = _parts(path[-1])
                r = average(row, (*path[:-1], row_name), squares.mean(outputs))
                c = average(column, (*path[:-1], column_name), squares.mean(inputs))
                r, c = jnp.expand_dims(r, outputs), jnp.expand_dims(c, inputs)
                v = r * (c / jnp.maximum(r.mean(inputs, keepdims=True), jnp.finfo(jnp.float32).tiny))
            u = g / (jnp.sqrt(v) + epsilon)
            rms = jnp.sqrt((u * u).mean(tuple(range(stack, u.ndim)), keepdims=True))
            directions[path] = u / jnp.maximum(1.0, rms)
        return unflatten_dict(directions), FactoredState(count, *map(unflatten_dict, (row, column, full)))

    return optax.GradientTransformation(init, update)


def _flat(tree: Any) -> dict[tuple[str, ...], jax.Array]:
    return dict(flatten_dict(tree))  # pyright: ignore[reportReturnType]


def _parts(name: str) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """The names of a matrix's two factors, row and column, and the axes each averages over.

    q_NDHK has q_ND, a mean over axes 2 and 3, and q_NHK, a mean over axis 1.
    """
    sides, letters = matrix(name), suffix(name)
    assert sides is not None, f"{name} is no matrix"
    inputs, outputs = sides
    stem, last = name.removesuffix(letters), len(letters)
    middle, first = last - len(outputs), last - len(outputs) - len(inputs)
    row, column = letters[:middle], letters[:first] + outputs
    return (stem + row, tuple(range(middle, last))), (stem + column, tuple(range(first, middle)))


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Muon's direction: the orthogonal matrix nearest to the gradient's Nesterov momentum (Jordan et al. 2024).

    It is times 0.2 sqrt(max(fan in, fan out)), so that its elements have the size of AdamW's (0.2 to 0.4), whose
    learning rate and decay then carry over (Liu et al. 2025, Moonlight). Each layer, and each expert, is a matrix of
    its own; the heads of a projection are one, D x HK, as in both papers: by head it would be H small ones, whose
    updates are no longer orthogonal to each other.
    """

    def orthogonal(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, g: _orthogonal(path[-1].key, g), updates)

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(orthogonal))


def _orthogonal(name: str, g: jax.Array) -> jax.Array:
    sides = matrix(name)
    assert sides is not None, f"{name} is no matrix"
    stack = g.shape[: -len("".join(sides))]
    fan_in, fan_out = (math.prod(n) for n in (g.shape[len(stack) :][: len(sides[0])], g.shape[-len(sides[1]) :]))
    x = orthogonalise(g.reshape(*stack, fan_in, fan_out))
    return 0.2 * max(fan_in, fan_out) ** 0.5 * x.reshape(g.shape)


def orthogonalise(x: jax.Array, iterations: int = 5) -> jax.Array:
    """U V^T of each matrix x = U S V^T (the last two dimensions) by Newton-Schulz, in float32.

    x becomes a x + b (x x^T) x + c (x x^T)^2 x with Jordan's (a, b, c), which lift small singular values fastest and
    leave all of them between about 0.7 and 1.2, not at 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.astype(jnp.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # x x^T is the smaller of the two products
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT

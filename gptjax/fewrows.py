"""Products of few rows with a weight, which decoding is made of: their time is that of reading the weight.

XLA on a CPU computes the product of one row on one core (jax 0.12), and that of some dozens at a third of the speed of
many. Cut along the inputs into one product a core, whose results are added up, both read the weight as fast as the
memory gives it.
"""

import math
import os

import jax
import jax.numpy as jnp

# Rows up to which this is the faster form: beyond, a product is bound by arithmetic, and before jax 0.11 cut ones do it
# worse than whole ones.
FEW = 64 if jax.__version_info__ >= (0, 11) else 8


def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(equation, x, w), w being named inputs first: "batch inputs, inputs outputs -> batch outputs"."""
    letters, outputs = equation.split(",")[1].split("->")
    num_inputs = sum(letter not in outputs for letter in letters)
    batch, inputs = x.shape[: x.ndim - num_inputs], x.shape[x.ndim - num_inputs :]
    rows, size = math.prod(batch), math.prod(inputs)
    parts = math.gcd(size, _cores())
    if parts == 1 or rows > FEW or x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        return jnp.einsum(equation, x, w)
    x_PRC = jnp.moveaxis(x.reshape(rows, parts, size // parts), 1, 0)
    y_PRO = jnp.einsum("PRC,PCO->PRO", x_PRC, w.reshape(parts, size // parts, -1))
    return y_PRO.sum(0).reshape(*batch, *w.shape[num_inputs:])


def _cores() -> int:
    """The largest power of two of cores that this process may run on; a power, to divide the sizes of a model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 << (cores.bit_length() - 1)

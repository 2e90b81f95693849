"""Products of a few rows with a weight, which decoding is made of: their time is that of reading the weight.

XLA on a CPU computes the product of one row on one core (jax 0.12). Cut along the inputs into one product a core, whose
results are added up, it reads the weight as fast as the memory gives it.
"""

import math

import jax
import jax.numpy as jnp

from gptjax.ops.device import device
from gptjax.runtime.process import usable_cores

MANY_ROWS = 8  # from here on XLA's own product is as fast


def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(equation, x, w) of "batch inputs, inputs outputs -> batch outputs"."""
    weight, result = equation.split(",")[1].split("->")
    num_inputs = sum(letter not in result for letter in weight)
    batch, inputs = x.shape[: x.ndim - num_inputs], x.shape[x.ndim - num_inputs :]
    rows, size = math.prod(batch), math.prod(inputs)
    parts = math.gcd(size, 1 << (usable_cores().bit_length() - 1))  # a power of two, to divide the sizes of a model
    if parts == 1 or rows >= MANY_ROWS or x.dtype != jnp.float32 or device().platform != "cpu":
        return jnp.einsum(equation, x, w)
    x_PRC = jnp.moveaxis(x.reshape(rows, parts, size // parts), 1, 0)
    y_PRO = jnp.einsum("PRC,PCO->PRO", x_PRC, w.reshape(parts, size // parts, -1))
    return y_PRO.sum(0).reshape(*batch, *w.shape[num_inputs:])

"""Products of few rows with a weight, which decoding is made of: their time is that of reading the weight.

XLA on a CPU computes the product of one row on one core (jax 0.12), and that of some dozens at a third to two thirds of
the speed of many. Two forms read the weight as fast as the memory gives it: for a row or a few, the product cut along
the inputs into one a core, whose results are added up; for more, a weight that lies outputs first.
"""

import math

import jax
import jax.numpy as jnp

from gptjax.runtime.process import usable_cores

# Rows from which on the weight should lie outputs first (on a CPU, in float32); one row reads it a quarter slower so.
SEVERAL = 8

# Results of a weight read from the left, which are turned: as many as stay in a core's cache. A large head has more.
TURNED = 2**18


def several(rows: int, dtype: str) -> bool:
    """Whether decoding so many rows at once is faster with weights outputs first."""
    return rows >= SEVERAL and dtype == "float32" and jax.default_backend() == "cpu"


def outputs_first(equation: str) -> str:
    """The equation of the same product with the weight's outputs named first: BLD,HKD->BLHK for BLD,DHK->BLHK."""
    x, rest = equation.split(",")
    w, y = rest.split("->")
    return f"{x},{''.join([n for n in w if n in y] + [n for n in w if n not in y])}->{y}"


def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(equation, x, w), w being named inputs first, "batch inputs, inputs outputs -> batch outputs", or last."""
    letters, outputs = equation.split(",")[1].split("->")
    num_inputs = sum(letter not in outputs for letter in letters)
    batch, inputs = x.shape[: x.ndim - num_inputs], x.shape[x.ndim - num_inputs :]
    rows, size = math.prod(batch), math.prod(inputs)
    if letters[0] in outputs:
        # As matrices: with more dimensions XLA on a CPU copies the weight at each step.
        x_RC, w_OC = x.reshape(rows, size), w.reshape(-1, size)
        if rows * len(w_OC) > TURNED:
            y_RO = jnp.einsum("RC,OC->RO", x_RC, w_OC)
        else:
            # Read from the left a weight takes an eighth to a quarter less time. The barrier keeps XLA from exchanging
            # the two again.
            y_RO = jax.lax.optimization_barrier(jnp.einsum("OC,RC->OR", w_OC, x_RC)).T
        return y_RO.reshape(*batch, *w.shape[: w.ndim - num_inputs])
    parts = math.gcd(size, _cores())
    if parts == 1 or rows >= SEVERAL or x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        return jnp.einsum(equation, x, w)
    x_PRC = jnp.moveaxis(x.reshape(rows, parts, size // parts), 1, 0)
    y_PRO = jnp.einsum("PRC,PCO->PRO", x_PRC, w.reshape(parts, size // parts, -1))
    return y_PRO.sum(0).reshape(*batch, *w.shape[num_inputs:])


def _cores() -> int:
    """The largest power of two of cores that this process may run on; a power, to divide the sizes of a model."""
    cores = usable_cores()
    return 1 << (cores.bit_length() - 1)

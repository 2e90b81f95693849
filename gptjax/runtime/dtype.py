"""The type of activations where model.dtype is auto: bfloat16 where the device multiplies it fast, else float32."""

import functools
import math
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp

LEAST_GAIN = 1.3  # of bfloat16's products over float32's: below it, what else a step does eats the gain
SECONDS, SIZE = 0.3, 1024  # of measuring, and the side of the matrices


@functools.cache
def preferred_dtype() -> tuple[str, str]:
    """(bfloat16 or float32, the reason) for the devices of this process.

    On a CPU products of both types are timed, in turn, for 0.3 s: whether bfloat16 gains anything depends on its matrix
    units and on jax's version. TPUs multiply nothing else, and GPUs have units for it from NVIDIA's Ampere on.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        gain = _measured_gain()
        chosen = "bfloat16" if gain >= LEAST_GAIN else "float32"
        return chosen, f"this CPU multiplies bfloat16 {gain:.1f} times as fast as float32"
    try:
        old = float(device.compute_capability) < 8
    except (AttributeError, ValueError):  # no NVIDIA device
        old = False
    return ("float32", "this GPU has no units for bfloat16") if old else ("bfloat16", "as fast as this device computes")


def product_seconds(size: int, dtypes: Iterable[str], seconds: float) -> dict[str, float]:
    """The shortest time of a product of two matrices of this side by type; `seconds` of products, the types in turn."""
    product = jax.jit(lambda a, b: a @ b)
    inputs = {dtype: jnp.ones((size, size), dtype) for dtype in dtypes}
    for x in inputs.values():
        product(x, x).block_until_ready()  # compiles
    shortest, until = dict.fromkeys(inputs, math.inf), time.perf_counter() + seconds
    while time.perf_counter() < until:
        for dtype, x in inputs.items():
            start = time.perf_counter()
            product(x, x).block_until_ready()
            shortest[dtype] = min(shortest[dtype], time.perf_counter() - start)
    return shortest


def _measured_gain() -> float:
    shortest = product_seconds(SIZE, ("float32", "bfloat16"), SECONDS)
    return shortest["float32"] / shortest["bfloat16"]

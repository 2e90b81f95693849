"""Output and gradients of a way to compute attention, and how far two ways may be apart."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from gptjax.ops.reference import AttentionMask


def value_and_grads(attention: Callable, qkvg: Iterable[Any], mask: AttentionMask, **options) -> list[np.ndarray]:
    """Output and gradients by q, k and v, of a gradient g of the output; options that are NumPy's are traced."""
    traced = {name: x for name, x in options.items() if isinstance(x, np.generic)}
    known = {name: x for name, x in options.items() if name not in traced}

    def run(mask, traced, *qkvg):
        out_BLHK, back = jax.vjp(lambda *qkv: attention(*qkv, mask, scale=0.4, **known, **traced), *qkvg[:3])
        return out_BLHK, *back(qkvg[3])

    return [np.asarray(x, np.float32) for x in jax.jit(run)(mask, traced, *qkvg)]


def assert_close(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    for g, want in zip(got[1:], wanted[1:], strict=True):
        assert np.abs(g - want).max() <= 1e-4 * np.abs(want).max() > 0

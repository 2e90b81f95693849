"""Laws of rotary positions, and the values of transformers that tests/test_transformers.py keeps in a file."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.model.rope import frequencies, linear, llama3, ntk, rope, rotate, yarn
from gptjax.ops.blockwise import attend_blockwise
from gptjax.ops.reference import attend, causal

STORED = json.loads((Path(__file__).parent / "fixtures" / "transformers.json").read_text())


@pytest.mark.parametrize("stored", STORED["ropes"], ids=lambda s: str(s["settings"]))
def test_frequencies_and_temperatures_are_those_of_transformers(stored):
    scaling, size, theta, factor, original = stored["settings"]
    cfg = ModelConfig(
        width=2 * size, num_heads=2, positions="rope", rope_theta=theta, rope_scaling=scaling, rope_factor=factor,
        rope_original_length=original,
    )  # fmt: skip
    frequency, temperature = rope(cfg)
    np.testing.assert_allclose(frequency, stored["frequency"], rtol=2e-6)
    assert temperature == pytest.approx(stored["temperature"], rel=1e-7)


@pytest.mark.parametrize("stored", STORED["attentions"], ids=lambda s: f"window {s['window']}, cap {s['softcap']}")
def test_attention_with_a_window_and_a_soft_cap_is_that_of_transformers(stored):
    draw = lambda seed, *shape: np.random.RandomState(seed).normal(size=shape).astype(np.float32)  # noqa: E731
    q_BLHK, k_BLGK, v_BLGK = 2 * draw(1, 1, 10, 4, 6), 2 * draw(2, 1, 10, 2, 6), draw(3, 1, 10, 2, 6)
    more = {"scale": 6**-0.5, "window": stored["window"] or None, "softcap": stored["softcap"]}
    mask = causal(jnp.ones((1, 10), jnp.int32))
    for got in (
        attend(q_BLHK, k_BLGK, v_BLGK, mask, **more),
        attend_blockwise(q_BLHK, k_BLGK, v_BLGK, mask, block=4, **more),
    ):
        np.testing.assert_allclose(got, stored["out_BLHK"], atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_every_scaling_keeps_the_fast_frequencies_and_divides_the_slowest_by_the_factor(factor):
    plain, original = frequencies(64, 10_000.0), 4096
    for scaled in (
        ntk(64, 10_000.0, factor),
        yarn(64, 10_000.0, factor, original),
        llama3(plain, factor, original),
    ):
        np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
        np.testing.assert_allclose(scaled[-1], plain[-1] / factor, rtol=1e-5)
        assert (np.diff(scaled) < 0).all()
    np.testing.assert_allclose(linear(plain, factor), plain / factor)


def test_yarn_and_llama3_go_by_the_turns_over_the_original_context():
    plain, original = np.asarray(frequencies(128, 10_000.0)), 2048
    turns = original * plain / (2 * math.pi)
    for scaled, most in ((yarn(128, 10_000.0, 8.0, original), 32), (llama3(plain, 8.0, original), 4)):
        # YaRN's ramp ends at whole numbers of a frequency, so the one next to each end may lie on it.
        np.testing.assert_allclose(scaled[turns > 1.2 * most], plain[turns > 1.2 * most], rtol=1e-6)
        np.testing.assert_allclose(scaled[turns < 1 / 1.2], plain[turns < 1 / 1.2] / 8, rtol=1e-6)
        between = (turns < most / 1.2) & (turns > 1.2)
        assert (scaled < plain)[between].all() and (scaled > plain / 8)[between].all() and between.sum() > 5


def test_linear_scaling_is_a_position_divided_by_the_factor():
    x_BLHK = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    near_BL, far_BL = jnp.arange(5)[None], 4 * jnp.arange(5)[None]
    plain = frequencies(8, 10_000.0)
    np.testing.assert_allclose(rotate(x_BLHK, far_BL, linear(plain, 4.0)), rotate(x_BLHK, near_BL, plain), atol=1e-6)


def test_rotation_keeps_the_length_of_a_head_and_the_temperature_multiplies_it():
    x_BLHK = jax.random.normal(jax.random.key(0), (1, 300, 2, 8))
    place_BL, frequency = jnp.arange(300)[None], frequencies(8, 10_000.0)
    size = jnp.linalg.norm(x_BLHK, axis=-1)
    np.testing.assert_allclose(jnp.linalg.norm(rotate(x_BLHK, place_BL, frequency), axis=-1), size, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotate(x_BLHK, place_BL, frequency, 1.3), axis=-1), 1.3 * size, rtol=1e-5
    )
    half = rotate(x_BLHK.astype(jnp.bfloat16), place_BL, frequency)
    exact = rotate(x_BLHK.astype(jnp.bfloat16).astype(jnp.float32), place_BL, frequency)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half[:, 257], exact[:, 257], atol=0.02)  # angles are float32 whatever the input

"""Laws of rotary positions, and the values of transformers that tests/test_transformers.py keeps in a file."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.model.rope import frequencies, rope, rotate
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

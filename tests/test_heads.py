"""Laws of the heads beside the language model's: leaves like others, which nothing but their own stage sees."""

import jax
import jax.numpy as jnp
import numpy as np
from test_lora import LORA, made  # noqa: F401 (a fixture)

from gptjax.config import MeshConfig, ModelConfig, TrainConfig
from gptjax.model.decoder import init_params
from gptjax.model.heads import add_heads, init_heads, read_head
from gptjax.model.lora import init_lora, join_lora, merge_lora
from gptjax.parallel.sharding import abstract, make_mesh, spec

HEADS = ("score_D", "value_D")


def test_a_score_begins_with_variance_1_over_width_plus_1_and_a_value_with_0():
    config = TrainConfig(model=ModelConfig(width=4096, num_heads=16))
    heads = init_heads(HEADS, config)(jax.random.key(0))
    assert abs(float(heads["score_D"].std()) * 64 - 1) < 0.05 and not heads["value_D"].any()
    assert [x.shape for x in heads.values()] == [(4096,)] * 2 and spec("D") == jax.P(None)
    assert init_heads(("value_D",), config)(jax.random.key(0)).keys() == {"value_D"}


def test_heads_change_no_other_parameter_and_are_kept_by_an_adaptation(made):  # noqa: F811
    decoder, base, _, moved = made
    width, config = decoder.cfg.width, TrainConfig(model=decoder.cfg)
    whole = jax.jit(add_heads(init_params(decoder), HEADS, config))(jax.random.key(0))
    assert whole.keys() == base.keys() | set(HEADS)
    jax.tree.map(np.testing.assert_array_equal, {name: whole[name] for name in base}, base)
    lora = jax.jit(add_heads(init_lora(LORA, decoder.cfg), ("score_D",), config))(jax.random.key(1))
    assert abstract(lora, make_mesh(MeshConfig(fsdp=4, tensor=2, data=1)))["score_D"].shape == (width,)
    adapted = moved | {"score_D": lora["score_D"]}
    for join in (join_lora, merge_lora):
        joined = join(base, adapted, LORA.scale)
        assert joined["score_D"] is adapted["score_D"] and joined.keys() == base.keys() | {"score_D"}
        assert all(joined[name] is base[name] for name in base if name != "layers")


def test_a_head_is_read_in_float32():
    x, head = jax.random.normal(jax.random.key(0), (2, 3, 64)), jax.random.normal(jax.random.key(1), (64,))
    got = read_head(x.astype(jnp.bfloat16), head)
    want = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(head, np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

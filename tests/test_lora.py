"""Laws of low-rank adaptation: it begins as the base, trains its leaves alone, and merges into the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_golden import SHAPES, batch

from gptjax.config import DataConfig, LoraConfig, MeshConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.model.decoder import dims, init_params, make_decoder
from gptjax.model.lora import adapted, init_lora, join_lora, merge_lora
from gptjax.parallel.sharding import abstract, make_mesh, on_host, suffix, to_global
from gptjax.training.losses import language_model_loss
from gptjax.training.step import compile_step, init_state, make_init, make_train_step

LORA = LoraConfig(rank=4, alpha=8)


def decoder_of(name: str):
    config = TrainConfig(
        model=SHAPES[name][0], tokenizer=TokenizerConfig(vocab_size=300), data=DataConfig(batch_size=16, length=32)
    )
    return make_decoder(config)


def inputs(step: int = 0):
    b = batch(step)
    return b["inputs_BL"], b["positions_BL"], b["segments_BL"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def made(request):
    """A decoder, its parameters, and leaves of its adaptation with b away from 0."""
    decoder = decoder_of(request.param)
    base = jax.jit(init_params(decoder))(jax.random.key(0))
    lora = jax.jit(init_lora(LORA, decoder.cfg))(jax.random.key(1))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), lora)
    return decoder, base, lora, moved


def test_leaves_are_named_by_their_shape_and_b_begins_as_zero(made):
    decoder, _, lora, _ = made
    size = dims(decoder.cfg, 300, 32) | {"R": 4}
    names = lora["layers"]
    assert {"q_a_NDR", "q_b_NRHK", "o_a_NHKR", "o_b_NRD", "k_b_NRGK", "w_in_a_NDR", "w_out_b_NRD"} <= names.keys()
    assert ("w_gate_a_NDR" in names) == (decoder.cfg.activation == "swiglu")
    for name, x in names.items():
        assert x.shape == tuple(size[letter] for letter in suffix(name))
        assert (x == 0).all() == ("_b_" in name)


def test_an_adaptation_whose_b_is_0_is_the_base_bit_for_bit(made):
    decoder, base, lora, _ = made
    apply = jax.jit(lambda params: decoder.apply({"params": params}, *inputs())[0])
    np.testing.assert_array_equal(apply(join_lora(base, lora, LORA.scale)), apply(base))


def test_a_merged_adaptation_is_the_joined_one(made, highest_precision):
    decoder, base, _, moved = made
    apply = jax.jit(lambda params: decoder.apply({"params": params}, *inputs())[0])
    joined, merged = join_lora(base, moved, LORA.scale), merge_lora(base, moved, LORA.scale)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    a, b, plain = apply(joined), apply(merged), apply(base)
    np.testing.assert_allclose(a, b, atol=2e-5)
    assert abs(a - plain).max() > 0.1, "and it is another model than the base"


@pytest.mark.parametrize("meshes", [("one",), pytest.param(("one", "mesh"), marks=pytest.mark.slow)])
def test_training_moves_the_leaves_alone_and_a_mesh_changes_no_loss(meshes, highest_precision):
    decoder, tx = decoder_of("llama"), optax.adam(1e-2)
    loss_fn = adapted(language_model_loss(decoder), LORA.scale)
    curves = {}
    for name in meshes:
        cfg = MeshConfig(data=1, fsdp=4, tensor=2) if name == "mesh" else MeshConfig(data=1)
        mesh = make_mesh(cfg, jax.devices()[: 8 if name == "mesh" else 1])
        with jax.set_mesh(mesh):
            state = init_state(make_init(init_lora(LORA, decoder.cfg), tx), 0, mesh)
            base = init_state(make_init(init_params(decoder), optax.identity()), 1, mesh).params
            before, example = on_host(base), to_global(batch(0), mesh)
            step = make_train_step(loss_fn, tx, lambda u: 1e-2)
            step = compile_step(step, mesh, *(abstract(x, mesh) for x in (state, {"base": base}, example)))
            curves[name] = []
            for _ in range(10):
                state, metrics = step(state, {"base": base}, example)
                curves[name].append(float(metrics["loss"]))
        assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(state.params)
        jax.tree.map(np.testing.assert_array_equal, before, on_host(base))
    assert curves["one"][-1] < curves["one"][0] - 0.05
    for name in meshes:
        np.testing.assert_allclose(curves[name], curves["one"], rtol=1e-5)


def test_targets_that_no_model_has_are_one_line():
    with pytest.raises(InputError, match=r"lora.targets=\('embed',\): wanted some of k, o, q"):
        LoraConfig(targets=("embed",))
    with pytest.raises(InputError, match="the model has none of these"):
        init_lora(LoraConfig(targets=("w_gate",)), SHAPES["gpt2"][0])

"""muP: nothing changes at the base width, and sizes do not change with the width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from unoptimised import UNOPTIMISED

from gptjax.config import ModelConfig, OptimConfig
from gptjax.model.decoder import Decoder, head, init_params
from gptjax.model.mup import attention_scale, init_factor, logits_factor, rate_factor
from gptjax.training.losses import cross_entropy
from gptjax.training.optim import make_optimizer

BASE = ModelConfig(num_layers=2, width=64, num_heads=4, dtype="float32")
VOCAB, LENGTH = 64, 16
ADAMW, MUON = OptimConfig(learning_rate=1e-3), OptimConfig(kind="muon", learning_rate=2e-3)
WIDE = dataclasses.replace(BASE, width=256, mup_base_width=64)


def test_factors_go_by_letters():
    """At four times the base: hidden matrices, then what is not one, then LoRA's two factors of rank R."""
    hidden, other = ("q_NDHK", "k_NDGK", "o_NHKD", "w_in_NDF", "w_out_NFD", "w_in_NEDF"), (
        "embed_VD", "head_VD", "position_TD", "norm_attn_ND", "q_bias_NHK", "norm_final_D")  # fmt: skip
    assert {(init_factor(WIDE, n), rate_factor(WIDE, n), rate_factor(WIDE, n, spectral=True)) for n in hidden} == {
        (0.5, 0.25, 0.5)
    }
    assert {(init_factor(WIDE, n), rate_factor(WIDE, n), rate_factor(WIDE, n, True)) for n in other} == {(1, 1, 1)}
    assert (rate_factor(WIDE, "q_a_NDR", True), rate_factor(WIDE, "q_b_NRHK", True)) == (0.25, 1.0)
    assert logits_factor(WIDE) == 0.25


def test_attention_is_one_over_the_head_size_where_heads_grow_and_one_over_its_root_where_they_do_not():
    assert attention_scale(BASE) == 1 / 4
    assert attention_scale(WIDE) == 4 / 64  # base heads of 16, heads of 64
    assert attention_scale(dataclasses.replace(WIDE, num_heads=16, head_dim=16)) == 1 / 4


@pytest.fixture(scope="module")
def wide():
    decoder = Decoder(dataclasses.replace(WIDE, num_layers=1), VOCAB, LENGTH)
    return decoder, jax.jit(init_params(decoder))(jax.random.key(0))


def test_initial_matrices_shrink_with_the_root_of_the_width_and_tables_do_not(wide):
    params = wide[1]
    std = {p[-1].key: float(x.std()) for p, x in jax.tree_util.tree_leaves_with_path(params)}
    wanted = dict.fromkeys(("q_NDHK", "k_NDGK", "v_NDGK", "w_in_NDF"), 0.02 / 2)
    wanted |= dict.fromkeys(("o_NHKD", "w_out_NFD"), 0.02 / 2 / 2**0.5)
    assert {name: std[name] for name in wanted} == pytest.approx(wanted, rel=0.02)
    assert (std["embed_VD"], std["position_TD"]) == pytest.approx((0.02, 0.02), rel=0.05)


def test_hidden_states_carry_the_factor_of_the_logits(wide):
    """Any head on them, of tokens or of a reward, then has it; at the start their norm's scale is 1."""
    decoder, params = wide
    ids_BL = jnp.arange(LENGTH)[None]
    x_BLD, _ = jax.jit(lambda p: decoder.apply({"params": p}, ids_BL, ids_BL, jnp.ones_like(ids_BL)))(params)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(x_BLD**2)), 0.25, rtol=1e-2)


def rows(steps: int) -> np.ndarray:
    """Token ids (steps, 8, LENGTH + 1): each is followed by one of four, so that there is something to learn."""
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, VOCAB, (steps, 8))]
    for _ in range(LENGTH):
        columns.append((columns[-1] * 5 + rng.integers(0, 4, (steps, 8))) % VOCAB)
    return np.stack(columns, axis=-1).astype(np.int32)


# Compiling is all of this test's time.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=UNOPTIMISED)
def trained(cfg: ModelConfig, optim: OptimConfig, steps: int):
    """Parameters after `steps` updates at a constant rate, and [hidden states, logits] before and after them."""
    decoder = Decoder(cfg, VOCAB, LENGTH)
    tx = make_optimizer(optim, lambda u: jnp.float32(optim.learning_rate), cfg)
    places_BL, ones_BL = jnp.tile(jnp.arange(LENGTH), (8, 1)), jnp.ones((8, LENGTH), jnp.int32)

    def apply(params, inputs_BL):
        return decoder.apply({"params": params}, inputs_BL, places_BL, ones_BL)[0]

    def loss(params, tokens_BL):
        x_BLD = apply(params, tokens_BL[:, :-1])
        return cross_entropy(x_BLD, head(params), tokens_BL[:, 1:], ones_BL.astype(jnp.float32), VOCAB) / ones_BL.size

    def step(carry, tokens_BL):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, tokens_BL), state, params)
        return (optax.apply_updates(params, updates), state), None

    *batches, last = rows(steps + 1)
    first = init_params(decoder)(jax.random.key(0))
    (params, _), _ = jax.lax.scan(step, (first, tx.init(first)), jnp.stack(batches))
    hidden = [apply(p, jnp.asarray(last[:, :-1])) for p in (first, params)]
    logits = [decoder.apply({"params": p}, x, method=decoder.logits) for p, x in zip((first, params), hidden)]
    return params, [x / logits_factor(cfg) for x in hidden], logits


@pytest.mark.slow
def test_at_the_base_width_no_bit_changes():
    """With Muon for the matrices and AdamW for the rest."""
    plain, mup = (trained(dataclasses.replace(BASE, mup_base_width=b), MUON, 4) for b in (0, 64))
    jax.tree.map(np.testing.assert_array_equal, plain, mup)


def test_an_update_is_multiplied_by_the_factor_of_its_name_and_weight_decay_is_that_of_the_base():
    params = {"q_NDHK": jnp.ones((1, 2, 2, 1)), "embed_VD": jnp.ones((3, 2))}
    for gradient, decay, wanted in ((1.0, 0.0, (-0.25, -1.0)), (0.0, 0.5, (-0.5, -0.5))):
        tx = make_optimizer(OptimConfig(weight_decay=decay, clip_norm=0.0), lambda u: jnp.float32(1.0), WIDE)
        grads = jax.tree.map(lambda x, g=gradient: g * x, params)
        updates, _ = tx.update(grads, tx.init(params), params)  # Adam's first step goes by signs
        np.testing.assert_allclose([updates[n].mean() for n in params], wanted, rtol=1e-6)


def slopes(optim: OptimConfig, widths: tuple[int, ...], mup: bool) -> tuple[float, float]:
    """The slopes of log2 size against log2 width after four updates.

    Sizes are root mean squares of what the updates changed: in the hidden states (after the norm, but for muP's factor)
    and in the logits.
    """
    sizes = []
    for width in widths:
        base = 64 if mup or width == 64 else 0  # at 64 the two are one program, compiled once
        _, *outputs = trained(dataclasses.replace(BASE, width=width, mup_base_width=base), optim, 4)
        sizes.append([float(jnp.sqrt(jnp.mean((a - b) ** 2))) for a, b in outputs])
    hidden, logits = np.polyfit(np.log2(widths), np.log2(sizes), 1)[0]
    return float(hidden), float(logits)


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "widths"), [(ADAMW, (64, 512)), (MUON, (64, 256))], ids=["adamw", "muon"])
def test_coordinates_keep_their_size_over_widths_and_without_mup_they_do_not(optim, widths):
    """The coordinate check of Tensor Programs V, appendix D.1."""
    hidden, logits = slopes(optim, widths, mup=True)
    assert abs(hidden) < 0.12 and abs(logits) < 0.25
    hidden, logits = slopes(optim, (widths[0], widths[-1]), mup=False)
    assert hidden > 0.15 and logits > 0.6

"""Schedules by hand, decay by letters, and a step of AdamW against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig, OptimConfig
from gptjax.decoder import Decoder, init_params
from gptjax.optim import decay_mask, make_optimizer, make_schedule


def rates(steps: int = 100, **settings) -> np.ndarray:
    schedule = make_schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, **settings), steps)
    return np.array([schedule(jnp.int32(u)) for u in range(steps + 5)])


def test_both_schedules_warm_up_in_a_straight_line():
    for kind in ("cosine", "wsd"):
        np.testing.assert_allclose(rates(schedule=kind)[:10], np.arange(1, 11) / 10, rtol=1e-6)


def test_cosine_ends_at_its_final_share_and_stays_there():
    r = rates(final_fraction=0.1)
    np.testing.assert_allclose(r[55], 0.1 + 0.9 * 0.5, rtol=1e-5)  # half of the way from 10 to 100
    np.testing.assert_allclose(r[100:], 0.1, rtol=1e-5)
    assert (np.diff(r[10:]) <= 1e-7).all()


def test_wsd_is_constant_and_then_falls_in_a_straight_line():
    r = rates(schedule="wsd", decay_fraction=0.25, final_fraction=0.0)
    np.testing.assert_allclose(r[10:76], 1.0)
    np.testing.assert_allclose(r[75:101], np.linspace(1, 0, 26), atol=1e-6)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    np.testing.assert_allclose(rates(steps=5)[:5], np.arange(1, 6) / 10, rtol=1e-6)


def test_matrices_decay_and_norms_biases_and_positions_do_not():
    decoder = Decoder(ModelConfig(num_layers=1, width=8, num_heads=2), 10, 4)
    mask = decay_mask(jax.eval_shape(init_params(decoder), jax.random.key(0)))
    decaying = {n for n, d in mask["layers"].items() if d} | {n for n, d in mask.items() if d is True}
    assert decaying == {"embed_VD", "q_NDHK", "k_NDGK", "v_NDGK", "o_NHKD", "w_in_NDF", "w_out_NFD"}


def test_one_update_is_adamw_by_hand():
    cfg = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1.0, epsilon=1e-8)
    tx = make_optimizer(cfg, lambda u: jnp.float32(0.1))
    params = {"w_DF": jnp.array([[2.0, -1.0]]), "norm_D": jnp.array([3.0])}
    grads = {"w_DF": jnp.array([[30.0, -40.0]]), "norm_D": jnp.array([0.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    # After one step Adam's ratio is the sign of the gradient, whatever the clipping; decay is added before the rate.
    np.testing.assert_allclose(updates["w_DF"], [[-0.1 * (1 + 0.5 * 2.0), -0.1 * (-1 + 0.5 * -1.0)]], rtol=1e-5)
    np.testing.assert_allclose(updates["norm_D"], [0.0], atol=1e-7)


def test_clipping_bounds_the_norm_that_reaches_the_moments():
    tx = make_optimizer(OptimConfig(clip_norm=1.0), lambda u: jnp.float32(0.1))
    params = {"w_DF": jnp.ones((1, 2))}
    _, state = tx.update({"w_DF": jnp.array([[30.0, -40.0]])}, tx.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (1, 2)]
    np.testing.assert_allclose(moments[0], 0.1 * np.array([[0.6, -0.8]]), rtol=1e-5)

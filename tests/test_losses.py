"""Laws of the losses: chunks change nothing, padding counts for nothing, and a hand-computed case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import losses
from gptjax.losses import cross_entropy, masked_mean, token_log_probs

B, L, D, V, VOCAB = 3, 8, 16, 64, 50


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    weights_BL = jax.random.bernoulli(keys[3], 0.7, (B, L)).astype(jnp.float32)
    targets_BL = jax.random.randint(keys[2], (B, L), 0, VOCAB)
    return jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (V, D)), targets_BL, weights_BL


def plain(x_BLD, head_VD, targets_BL, weights_BL, z_loss=0.0):
    """The loss written down directly, over all logits at once."""
    logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, head_VD)[..., :VOCAB]
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    picked_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return (weights_BL * (log_z_BL - picked_BL + z_loss * log_z_BL**2)).sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 8])
def test_chunks_change_neither_the_loss_nor_its_gradients(monkeypatch, rows_a_chunk, z_loss):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * B * rows_a_chunk * V)
    x, head, targets, weights = arrays()
    assert losses._num_chunks(targets.shape, V) == L // rows_a_chunk
    got, got_grads = jax.value_and_grad(
        lambda x, h: 3 * cross_entropy(x, h, targets, weights, VOCAB, z_loss), argnums=(0, 1)
    )(x, head)
    want, want_grads = jax.value_and_grad(lambda x, h: 3 * plain(x, h, targets, weights, z_loss), argnums=(0, 1))(
        x, head
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_array_equal(got_grads[1][VOCAB:], 0)


def test_no_array_of_all_logits_is_made(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * B * V)
    x, head, targets, weights = arrays()
    step = jax.jit(jax.grad(lambda x, h: cross_entropy(x, h, targets, weights, VOCAB), argnums=(0, 1)))
    text = step.lower(x, head).as_text()
    assert f"tensor<{B}x1x{V}xf32>" in text and f"tensor<{B}x{L}x{V}xf32>" not in text


def test_weight_zero_counts_for_nothing():
    x, head, targets, weights = arrays()
    moved = jnp.where(weights[..., None] > 0, x, x + 1)
    a, b = (cross_entropy(v, head, targets, weights, VOCAB) for v in (x, moved))
    np.testing.assert_array_equal(a, b)
    assert cross_entropy(x, head, targets, jnp.ones_like(weights), VOCAB) > a


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    x, _, targets, weights = arrays()
    loss = cross_entropy(x, jnp.zeros((V, D)), targets, weights, VOCAB) / weights.sum()
    np.testing.assert_allclose(loss, np.log(VOCAB), rtol=1e-6)


def test_token_log_probs_sum_to_the_cross_entropy():
    x, head, targets, weights = arrays()
    total = -(token_log_probs(x, head, targets, VOCAB) * weights).sum()
    np.testing.assert_allclose(total, cross_entropy(x, head, targets, weights, VOCAB), rtol=1e-6)


def test_masked_mean_by_hand():
    assert masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([1.0, 3.0, 0.0])) == (1 + 6) / 4
    assert masked_mean(jnp.array([5.0]), jnp.array([0.0])) == 0

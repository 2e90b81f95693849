"""Laws of the losses: chunks change nothing, padding counts for nothing, and a hand-computed case."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.config.command_line import load_recipe
from gptjax.evals.loss import exact_answers
from gptjax.model.counts import padded_vocab
from gptjax.model.decoder import MASKED, logits
from gptjax.ops import linear
from gptjax.ops.device import Device
from gptjax.ops.linear import count_chunks, loss_chunks
from gptjax.parallel.sharding import make_mesh, to_global
from gptjax.runtime.hardware import CHIPS
from gptjax.training.losses import cross_entropy, likeliest, token_log_probs

B, L, D, V, VOCAB = 3, 8, 16, 64, 50


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    weights_BL = jax.random.bernoulli(keys[3], 0.7, (B, L)).astype(jnp.float32)
    targets_BL = jax.random.randint(keys[2], (B, L), 0, VOCAB)
    return jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (V, D)), targets_BL, weights_BL


def plain(x_BLD, head_VD, targets_BL, weights_BL, z_loss=0.0, softcap=0.0):
    """The loss written down directly, over all logits at once."""
    logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, head_VD)[..., :VOCAB]
    if softcap:
        logits_BLV = softcap * jnp.tanh(logits_BLV / softcap)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    picked_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return (weights_BL * (log_z_BL - picked_BL + z_loss * log_z_BL**2)).sum()


def hold(monkeypatch, size: int) -> None:
    """Lets a chunk hold so many bytes of logits."""
    monkeypatch.setattr(linear, "CPU_LOGITS", size)
    monkeypatch.setattr(linear, "CPU_HEAD_SHARE", 0)


@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (0.1, 0.0), (0.0, 3.0), (0.1, 3.0)])
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 8])
def test_chunks_change_neither_the_loss_nor_its_gradients(monkeypatch, rows_a_chunk, z_loss, softcap):
    hold(monkeypatch, 4 * B * rows_a_chunk * V)
    x, head, targets, weights = arrays()
    assert loss_chunks(targets.shape, head.shape)[0] == L // rows_a_chunk
    more = {"z_loss": z_loss, "softcap": softcap}
    chunked = lambda x, h: 3 * cross_entropy(x, h, targets, weights, VOCAB, **more)  # noqa: E731
    direct = lambda x, h: 3 * plain(x, h, targets, weights, **more)  # noqa: E731
    got, got_grads = jax.value_and_grad(chunked, argnums=(0, 1))(x, head)
    want, want_grads = jax.value_and_grad(direct, argnums=(0, 1))(x, head)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_array_equal(got_grads[1][VOCAB:], 0)


def test_no_array_of_all_logits_is_made(monkeypatch):
    hold(monkeypatch, 4 * B * V)
    x, head, targets, weights = arrays()
    step = jax.jit(jax.grad(lambda x, h: cross_entropy(x, h, targets, weights, VOCAB), argnums=(0, 1)))
    text = step.lower(x, head).as_text()
    assert f"tensor<{B}x1x{V}xf32>" in text and f"tensor<{B}x{L}x{V}xf32>" not in text


def test_chunks_of_rows_that_devices_share_stay_where_they_lie(monkeypatch):
    """Each chunk has a part of every device's places; else each would have to be sent to all devices."""
    hold(monkeypatch, 4 * B * V)
    x, head, targets, weights = (np.asarray(a) for a in arrays())
    mesh = make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])
    batch = {"x_BLD": x, "head_VD": head, "targets_BL": targets, "weights_BL": weights}
    step = jax.value_and_grad(
        lambda x, head, b: cross_entropy(x, head, b["targets_BL"], b["weights_BL"], VOCAB), argnums=(0, 1)
    )
    want, want_grads = step(x, head, batch)
    with jax.set_mesh(mesh):
        assert loss_chunks(targets.shape, head.shape) == (2, 4)
        batch = to_global(batch, mesh)
        compiled = jax.jit(step).lower(batch["x_BLD"], batch["head_VD"], batch).compile()
        got, got_grads = compiled(batch["x_BLD"], batch["head_VD"], batch)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())


def plain_log_probs(x_BLD, head_VD, targets_BL, temperature, softcap):
    """log p of the targets and the entropy, written down directly."""
    logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, head_VD)[..., :VOCAB]
    if softcap:
        logits_BLV = softcap * jnp.tanh(logits_BLV / softcap)
    log_p_BLV = jax.nn.log_softmax(logits_BLV / temperature)
    picked_BL = jnp.take_along_axis(log_p_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return picked_BL, -(jnp.exp(log_p_BLV) * log_p_BLV).sum(-1)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.7, 3.0)])
@pytest.mark.parametrize("rows_a_chunk", [1, 8])
def test_token_log_probs_and_entropies_in_chunks_are_the_plain_ones(monkeypatch, rows_a_chunk, temperature, softcap):
    hold(monkeypatch, 4 * B * rows_a_chunk * V)
    x, head, targets, weights = arrays()
    more = jax.random.normal(jax.random.key(1), (B, L))

    def weighted(function):  # other factors for each token and for both results
        def value(x, head):
            log_p, entropy = function(x, head)
            return (log_p * weights).sum() + (entropy * more).sum(), (log_p, entropy)

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)

    chunked = lambda x, h: token_log_probs(x, h, targets, VOCAB, softcap, temperature)  # noqa: E731
    direct = lambda x, h: plain_log_probs(x, h, targets, temperature, softcap)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        (_, got), got_grads = weighted(chunked)(x, head)
        (_, want), want_grads = weighted(direct)(x, head)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert a.shape == b.shape and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * abs(b).max())
    np.testing.assert_array_equal(got_grads[1][VOCAB:], 0)


def test_token_log_probs_sum_to_the_cross_entropy():
    x, head, targets, weights = arrays()
    total = -(token_log_probs(x, head, targets, VOCAB)[0] * weights).sum()
    np.testing.assert_allclose(total, cross_entropy(x, head, targets, weights, VOCAB), rtol=1e-6)


def test_token_log_probs_hold_no_array_of_all_logits(monkeypatch):
    hold(monkeypatch, 4 * B * V)
    x, head, targets, _ = arrays()
    step = jax.jit(jax.grad(lambda x, h: sum(a.sum() for a in token_log_probs(x, h, targets, VOCAB)), argnums=(0, 1)))
    lowered = step.lower(x, head)
    assert f"tensor<{B}x1x{V}xf32>" in lowered.as_text()
    shapes = [set(shape.split(",")) for shape in re.findall(r"f32\[([\d,]+)\]", lowered.compile().as_text())]
    assert {str(B), "1", str(V)} in shapes, "a chunk of logits"
    assert not any({str(B), str(L), str(V)} <= shape for shape in shapes)


def test_a_soft_cap_bounds_the_logits_and_leaves_the_masked_ids_masked():
    x, head, *_ = arrays()
    free, capped = (logits(20 * x, head, VOCAB, c) for c in (0.0, 30.0))
    assert abs(free[..., :VOCAB]).max() > 100 and 29 < abs(capped[..., :VOCAB]).max() <= 30
    assert (capped[..., VOCAB:] == jnp.float32(MASKED)).all()
    small = logits(0.001 * x, head, VOCAB, 30.0)
    np.testing.assert_allclose(small, logits(0.001 * x, head, VOCAB), rtol=1e-5)  # c tanh(z / c) is z for small z


@pytest.mark.parametrize("name", ["gpt2 124m", "llama_1b", "llama_8b", "gpt3 175b"])
@pytest.mark.parametrize("chip", ["h100", "tpu v5", "tpu v5 lite"])
def test_an_accelerators_chunks_are_few_and_take_a_small_share_of_its_memory(name, chip):
    (recipe, _, size), memory = name.partition(" "), CHIPS[chip].memory
    config = load_recipe(recipe).config("pretrain", size)
    sharded, vocab = abs(config.mesh.fsdp), padded_vocab(config.tokenizer.vocab_size) / config.mesh.tensor
    rows, length = config.data.batch_size // (sharded * config.optim.accumulate), config.data.length
    on, each = Device("tpu" if "tpu" in chip else "gpu", memory=memory), 4 * rows * vocab
    chunks = count_chunks(on, length, each, 4 * vocab * config.model.width / sharded)
    assert each * length / chunks <= memory / 16
    # Not smaller than need be: each chunk sends the head, and the head's gradient.
    assert chunks == 1 or each * length / (chunks / 2) > memory / 16
    assert rows * length / chunks >= min(rows * length, 1024)


def test_a_cpus_chunks_stay_in_its_caches_or_below_the_heads_gradient():
    for width in (64, 8192):
        chunks = count_chunks(Device("cpu"), 256, 4 * 16 * 8192, 4 * 8192 * width)
        assert 4 * 16 * 8192 * 256 / chunks <= max(2**24, 4 * 8192 * width / 2)
        assert chunks == (8 if width == 64 else 1)


def test_the_likeliest_ids_in_chunks_are_those_of_all_logits(monkeypatch):
    x_BLD, head_VD, _, _ = arrays()
    want_BL = jnp.einsum("BLD,VD->BLV", x_BLD, head_VD)[..., :VOCAB].argmax(axis=-1)
    hold(monkeypatch, 4 * B * 2 * V)
    assert loss_chunks((B, L), head_VD.shape)[0] > 1
    np.testing.assert_array_equal(likeliest(x_BLD, head_VD, VOCAB), want_BL)


def test_an_answer_is_exact_where_each_of_its_tokens_is_the_likeliest():
    """By hand: answers end with a segment or where the weights do, and what is not weighted may be anything."""
    segments = [[1, 1, 1, 1, 1, 2, 2, 3], [1, 1, 2, 2, 2, 2, 0, 0]]
    weights = [[0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 0, 0]]
    guessed = [[7, 1, 2, 7, 7, 3, 4, 7], [1, 7, 7, 1, 7, 1, 7, 7]]
    targets = [[0, 1, 2, 0, 5, 3, 4, 6], [1, 1, 0, 1, 0, 1, 0, 0]]
    batch = {"segments_BL": segments, "weights_BL": weights, "targets_BL": targets}
    batch = {name: jnp.array(x) for name, x in batch.items()}
    x_BLD, decoder = jnp.eye(8)[jnp.array(guessed)], types.SimpleNamespace(vocab_size=8)
    # Of the first row 1 2 and 3 4 are exact, 5 and 6 are not; of the second both answers of segment 2, and not 1 1.
    answers, exact = exact_answers(decoder, {"head_VD": jnp.eye(8)}, x_BLD, batch)  # pyright: ignore
    assert (int(answers), int(exact)) == (7, 4)

"""Laws of the decoder, for both families."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.model.decoder import Decoder, head, init_params

VOCAB, LENGTH, ROWS = 50, 12, 2
GPT2 = ModelConfig(num_layers=2, width=16, num_heads=4, dtype="float32", init_std=0.3)
LLAMA = dataclasses.replace(
    GPT2, positions="rope", norm="rmsnorm", activation="swiglu", biases=False, tied=False, queries_per_kv=2
)


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def lm(request):
    decoder = Decoder(request.param, VOCAB, LENGTH)
    params = init_params(decoder)(jax.random.key(0))
    # Biases and scales start at 0 and 1, where a forgotten one would not show.
    noise = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return decoder, jax.tree.map(jnp.add, params, noise)


def ids(seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (ROWS, LENGTH), 0, VOCAB)


POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
ONE = jnp.ones((ROWS, LENGTH), jnp.int32)


def hidden(lm, tokens_BL, positions_BL=POSITIONS, segments_BL=ONE, **more):
    decoder, params = lm
    return decoder.apply({"params": params}, tokens_BL, positions_BL, segments_BL, **more)[0]


def test_positions_matter(lm):
    a_BL = jnp.full((ROWS, LENGTH), 3).at[:, 2].set(4)
    b_BL = jnp.full((ROWS, LENGTH), 3).at[:, 4].set(4)
    assert abs(hidden(lm, a_BL)[:, -1] - hidden(lm, b_BL)[:, -1]).max() > 1e-3


def test_rotary_positions_are_relative():
    lm = Decoder(LLAMA, VOCAB, 64), init_params(Decoder(LLAMA, VOCAB, 64))(jax.random.key(0))
    np.testing.assert_allclose(hidden(lm, ids()), hidden(lm, ids(), POSITIONS + 40), atol=1e-4)


def test_ids_that_pad_the_vocabulary_are_never_likely(lm):
    decoder, params = lm
    logits_BLV = decoder.apply({"params": params}, hidden(lm, ids()), method="logits")
    assert logits_BLV.shape[-1] == 64 and (jax.nn.softmax(logits_BLV)[..., VOCAB:] == 0).all()
    assert head(params).shape == (64, decoder.cfg.width)


def test_remat_keeps_less_for_the_backward_pass():
    def kept(remat: str) -> int:
        cfg = dataclasses.replace(GPT2, remat=remat, num_layers=4)
        decoder = Decoder(cfg, VOCAB, LENGTH)
        params = init_params(decoder)(jax.random.key(0))
        loss = lambda p: (decoder.apply({"params": p}, ids(), POSITIONS, ONE)[0] ** 2).sum()  # noqa: E731
        return sum(x.size for x in jax.tree.leaves(jax.vjp(loss, params)[1]))

    assert kept("full") < kept("dots") < kept("none")


def test_dropout_needs_a_key_and_changes_with_it():
    cfg = dataclasses.replace(GPT2, dropout=0.5)
    lm = Decoder(cfg, VOCAB, LENGTH), init_params(Decoder(cfg, VOCAB, LENGTH))(jax.random.key(0))
    off, on, again, other = (hidden(lm, ids(), key=k and jax.random.key(k)) for k in (None, 1, 1, 2))
    np.testing.assert_array_equal(on, again)
    assert abs(on - off).max() > 0.1 and abs(on - other).max() > 0.1


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(lm):
    decoder, params = lm
    half = Decoder(dataclasses.replace(decoder.cfg, dtype="bfloat16"), VOCAB, LENGTH)
    x_BLD = half.apply({"params": params}, ids(), POSITIONS, ONE)[0]
    assert x_BLD.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(init_params(half)(jax.random.key(0))))
    np.testing.assert_allclose(x_BLD.astype(jnp.float32), hidden(lm, ids()), atol=0.2)

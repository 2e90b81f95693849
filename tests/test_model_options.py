"""Laws of the decoder, plain and with each option; an option changes its numbers, and is counted."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import ModelConfig
from gptjax.config.section import InputError
from gptjax.model.block import block
from gptjax.model.cache import empty_cache
from gptjax.model.counts import flops_per_token, forward_flops, padded_vocab, parameters
from gptjax.model.decoder import Decoder, dims, init_params
from gptjax.ops.reference import causal
from gptjax.parallel.sharding import suffix

VOCAB, LENGTH, CUT, CHANGED = 50, 12, 5, 7
GPT2 = ModelConfig(num_layers=2, width=16, num_heads=4, dtype="float32", init_std=0.3)
LLAMA = dataclasses.replace(
    GPT2, positions="rope", norm="rmsnorm", activation="swiglu", biases=False, tied=False, queries_per_kv=2
)
OPTIONS = {
    "gpt2": (GPT2, {}),
    "llama": (LLAMA, {}),
    "yarn": (LLAMA, {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 16}),
    "window": (GPT2, {"window": 3}),
    "window, global": (LLAMA, {"window": 3, "global_every": 2}),
    "qk_norm": (LLAMA, {"qk_norm": True}),
    "attention_softcap": (GPT2, {"attention_softcap": 2.0}),
    "logit_softcap": (GPT2, {"logit_softcap": 3.0}),
    "parallel": (GPT2, {"parallel": True}),
    "relu2, head_dim": (LLAMA, {"activation": "relu2", "head_dim": 6}),
    "qkv_biases, geglu": (LLAMA, {"qkv_biases": True, "activation": "geglu"}),
    "gemma": (LLAMA, {"norm_weights": "offset", "post_norms": True, "embedding": "scaled", "attention_divisor": 9.0,
                      "qk_norm": True, "window": 3, "global_every": 2, "rope_theta_local": 10.0,
                      "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 16}),
    "nanochat": (LLAMA, {"norm_weights": "none", "embedding": "normed", "qk_norm": True, "activation": "relu2"}),
    "logit_scale": (GPT2, {"logit_scale": 0.5, "norm_weights": "none", "post_norms": True}),
    "blockwise": (LLAMA, {"attention": "blockwise", "attention_block": 4, "window": 4, "attention_softcap": 2.0}),
    "all": (
        LLAMA,
        {
            "num_layers": 3, "rope_scaling": "yarn", "rope_factor": 2.0, "rope_original_length": 8, "window": 4,
            "global_every": 2, "qk_norm": True, "attention_softcap": 5.0, "logit_softcap": 5.0, "parallel": True,
            "activation": "relu2", "head_dim": 6, "attention": "blockwise", "attention_block": 4,
        },
    ),
}  # fmt: skip

POSITION_L = np.arange(LENGTH)
PACKED_L = np.concatenate([np.arange(CUT), np.arange(LENGTH - CUT)])


def option(name: str) -> ModelConfig:
    return dataclasses.replace(OPTIONS[name][0], **OPTIONS[name][1])


def ids(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, LENGTH)


ROW = (ids(1), POSITION_L, np.ones(LENGTH, int))  # tokens, positions and segments of one document


def random_params(cfg: ModelConfig, vocab_size: int = VOCAB, context: int = LENGTH):
    """Parameters that depend on their names alone; biases and scales are not 0 and 1, where one forgotten is unseen."""

    def one(path, leaf):
        name = path[-1].key
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape).astype(np.float32)
        return (1.0 if name.startswith("norm_") and "bias" not in name else 0.0) + 0.3 * noise

    shapes = jax.eval_shape(init_params(Decoder(cfg, vocab_size, context)), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def forward(cfg: ModelConfig):
    """Compiled logits(params, tokens, positions, segments)."""
    decoder = Decoder(cfg, VOCAB, LENGTH)

    def run(params, tokens_BL, positions_BL, segments_BL):
        x_BLD, _ = decoder.apply({"params": params}, tokens_BL, positions_BL, segments_BL)
        return decoder.apply({"params": params}, x_BLD, method="logits")[..., :VOCAB]

    return jax.jit(run)


@functools.cache
def rows(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Logits of rows that differ in one thing each, from one compiled program."""
    a_L, other_L = ids(1), ids(2)
    changed_L = a_L.copy()
    changed_L[CHANGED] = (a_L[CHANGED] + 1) % VOCAB
    before_L = np.concatenate([other_L[:CUT], a_L[CUT:]])
    alone_L = np.concatenate([a_L[CUT:], other_L[:CUT]])
    one_L, two_L = np.ones(LENGTH, int), np.where(np.arange(LENGTH) < CUT, 1, 2)
    table = {
        "a": (a_L, POSITION_L, one_L),
        "changed": (changed_L, POSITION_L, one_L),
        "before": (before_L, POSITION_L, one_L),
        "packed a": (a_L, PACKED_L, two_L),
        "packed before": (before_L, PACKED_L, two_L),
        "alone": (alone_L, POSITION_L, one_L),
    }
    got_RLV = forward(cfg)(random_params(cfg), *(np.stack(column) for column in zip(*table.values())))
    return dict(zip(table, np.asarray(got_RLV)))


@pytest.mark.parametrize("name", OPTIONS)
def test_future_tokens_do_not_change_the_past(name):
    a_LV, b_LV = rows(option(name))["a"], rows(option(name))["changed"]
    np.testing.assert_array_equal(a_LV[:CHANGED], b_LV[:CHANGED])
    assert abs(a_LV - b_LV)[CHANGED].max() > 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_a_document_does_not_see_the_one_packed_before_it(name):
    row = rows(option(name))
    np.testing.assert_array_equal(row["packed a"][CUT:], row["packed before"][CUT:])
    np.testing.assert_allclose(row["packed a"][CUT:], row["alone"][: LENGTH - CUT], atol=2e-5)
    assert abs(row["a"] - row["before"])[CUT:].max() > 1e-3  # unless it is one document


@pytest.mark.parametrize("name", OPTIONS)
def test_cached_decoding_equals_the_full_forward_pass(name):
    cfg = option(name)
    decoder, params = Decoder(cfg, VOCAB, LENGTH), random_params(cfg)

    @jax.jit
    def decode(params, cache, tokens_BL, positions_BL):
        x_BLD, cache = decoder.apply({"params": params}, tokens_BL, positions_BL, cache=cache)
        return decoder.apply({"params": params}, x_BLD, method="logits")[..., :VOCAB], cache

    cache, parts = empty_cache(cfg, 1, LENGTH, jnp.float32), []
    # Several tokens at once and, where these take another path, one by one.
    for start in range(0, LENGTH, 4):
        single = start == 4 and cfg.attention == "blockwise"
        for part in [slice(i, i + 1) for i in range(4, 8)] if single else [slice(start, start + 4)]:
            logits_BLV, cache = decode(params, cache, ids(1)[None, part], POSITION_L[None, part])
            parts.append(logits_BLV[0])
    np.testing.assert_allclose(np.concatenate(parts), rows(cfg)["a"], atol=5e-5)


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name][1]])
def test_the_option_is_not_ignored(name):
    plain = OPTIONS[name][0]
    assert abs(rows(plain)["a"] - rows(option(name))["a"]).max() > 1e-2


REACHES = [(2, 0, "blockwise"), (2, 0, "plain"), (3, 2, "plain"), (2, 1, "plain")]


@pytest.mark.parametrize(("layers", "every", "attention"), REACHES)
def test_a_token_is_seen_from_as_far_as_the_windows_reach(layers, every, attention):
    """Through N layers of window W a change reaches N (W - 1) places; through a global layer, all that follow."""
    cfg = dataclasses.replace(
        GPT2, num_layers=layers, window=3, global_every=every, attention=attention, attention_block=4
    )
    a_L, b_L = ids(1), ids(1)
    b_L[1] = (b_L[1] + 1) % VOCAB
    both = (np.stack([a_L, b_L]), np.stack([POSITION_L] * 2), np.ones((2, LENGTH), int))
    a_LV, b_LV = forward(cfg)(random_params(cfg), *both)
    seen_L = abs(a_LV - b_LV).max(axis=-1) > 1e-6
    last = LENGTH if every else 1 + layers * (3 - 1)
    np.testing.assert_array_equal(seen_L, (POSITION_L >= 1) & (POSITION_L <= last))


@pytest.mark.parametrize("parallel", [True, False])
def test_in_parallel_attention_and_mlp_add_up(parallel):
    """Each branch alone gives its part of the sum, unless the MLP reads what attention wrote."""
    cfg = dataclasses.replace(LLAMA, num_layers=1, parallel=parallel)
    p = {name.replace("_N", "_", 1): x[0] for name, x in random_params(cfg)["layers"].items()}
    x_BLD = np.random.default_rng(0).normal(size=(1, LENGTH, 16)).astype(np.float32)

    def change(*without):
        weights = {n: 0 * x if n in without else x for n, x in p.items()}
        return block(cfg, weights, x_BLD, POSITION_L[None], causal(jnp.ones((1, LENGTH), int)))[0] - x_BLD

    apart = change("w_out_FD") + change("o_HKD")
    assert np.allclose(change(), apart, atol=1e-4) == parallel


def hidden(cfg: ModelConfig, **more) -> jax.Array:
    """x_BLD of one row."""
    return Decoder(cfg, VOCAB, LENGTH).apply({"params": random_params(cfg)}, *(x[None] for x in ROW), **more)[0]


def test_dropout_needs_a_key_and_changes_with_it():
    cfg = dataclasses.replace(GPT2, dropout=0.5)
    off, on, again, other = (hidden(cfg, key=k and jax.random.key(k)) for k in (None, 1, 1, 2))
    np.testing.assert_array_equal(on, again)
    assert abs(on - off).max() > 0.1 and abs(on - other).max() > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(name):
    half = dataclasses.replace(option(name), dtype="bfloat16")
    x_BLD = hidden(half)
    assert x_BLD.dtype == jnp.bfloat16
    shapes = jax.eval_shape(init_params(Decoder(half, VOCAB, LENGTH)), jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))
    np.testing.assert_allclose(x_BLD.astype(jnp.float32), hidden(option(name)), atol=0.2)


# Rematerialisation


def loss_of(cfg: ModelConfig):
    row = [x[None] for x in ROW]
    return lambda p: (Decoder(cfg, VOCAB, LENGTH).apply({"params": p}, *row)[0] ** 2).sum()


@pytest.mark.slow
def test_remat_by_names_and_offloading_change_no_gradient():
    plain = dataclasses.replace(LLAMA, window=4, global_every=2)
    params = random_params(plain)
    wanted = jax.jit(jax.grad(loss_of(plain)))(params)
    names = {"remat": "names", "attention": "blockwise", "attention_block": 4}
    offload = {"remat": "offload", "remat_names": ("query", "attention", "mlp"), "unroll": 0}
    for change in (names, offload):
        got = jax.jit(jax.grad(loss_of(dataclasses.replace(plain, **change))))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3), wanted, got)


def kept(cfg: ModelConfig) -> int:
    """How many numbers are held for the backward pass, indices aside; nothing is compiled."""
    residuals = jax.eval_shape(lambda p: jax.vjp(loss_of(cfg), p)[1], random_params(cfg))
    return sum(x.size for x in jax.tree.leaves(residuals) if jnp.issubdtype(x.dtype, jnp.floating))


def test_each_name_keeps_one_array_more_for_the_backward_pass():
    cfg = dataclasses.replace(GPT2, biases=False)
    nothing, products, everything = (kept(dataclasses.replace(cfg, remat=r)) for r in ("full", "dots", "none"))
    assert nothing < products < everything
    sizes = {"query": 16, "key": 16, "value": 16, "attention": 16, "mlp": 64}
    for name, size in sizes.items():
        some = kept(dataclasses.replace(cfg, remat="names", remat_names=(name,)))
        assert some == nothing + cfg.num_layers * LENGTH * size, name
    assert nothing + 2 * LENGTH * 128 < everything


def test_blockwise_attention_is_kept_once_and_with_what_its_backward_pass_needs():
    cfg = dataclasses.replace(GPT2, attention="blockwise", attention_block=4)
    nothing, some = (kept(dataclasses.replace(cfg, remat=r)) for r in ("full", "names"))
    assert some == nothing + cfg.num_layers * LENGTH * (16 + cfg.num_heads)


def test_remat_that_keeps_attention_does_not_compute_it_again():
    def exponentials(remat: str) -> int:
        cfg = dataclasses.replace(option("all"), remat=remat)
        return jax.jit(jax.grad(loss_of(cfg))).lower(random_params(cfg)).as_text().count("stablehlo.exponential")

    assert exponentials("names") == exponentials("none") < exponentials("full")


def test_offloading_writes_what_is_kept_to_the_memory_of_the_host():
    """A CPU's lowering drops the memory's name, so the program is read as it is lowered for an accelerator."""

    def transfers(*names, remat="offload"):
        cfg = dataclasses.replace(GPT2, remat=remat, remat_names=names)
        lowered = jax.jit(jax.grad(loss_of(cfg))).trace(random_params(cfg)).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("pinned_host")

    assert transfers("attention", "mlp", remat="names") == 0
    assert 0 < transfers("mlp") < transfers("attention", "mlp")


# Counts


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "num_heads": st.sampled_from([2, 4]),
            "queries_per_kv": st.sampled_from([1, 2]),
            "head_dim": st.sampled_from([0, 4, 10]),
            "mlp_ratio": st.sampled_from([2.0, 3.5]),
            "positions": st.sampled_from(["learned", "rope"]),
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "norm_weights": st.sampled_from(["scale", "offset", "none"]),
            "post_norms": st.booleans(),
            "activation": st.sampled_from(["gelu", "geglu", "swiglu", "relu2"]),
            "biases": st.booleans(),
            "qkv_biases": st.booleans(),
            "tied": st.booleans(),
            "qk_norm": st.booleans(),
            "parallel": st.booleans(),
        }
    )
)
def test_the_count_is_that_of_the_decoder_with_any_options(values):
    cfg = ModelConfig(width=16, **values | {"qkv_biases": values["qkv_biases"] and not values["biases"]})
    shapes = jax.eval_shape(init_params(Decoder(cfg, 70, 9)), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters(cfg, padded_vocab(70), 9)["total"]
    size = dims(cfg, 70, 9)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        assert x.shape == tuple(size[letter] for letter in suffix(path[-1].key)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("length", [5, 17, 64])
def test_flops_with_windows_are_the_sum_over_tokens_and_layers(length):
    cfg = ModelConfig(num_layers=3, width=16, num_heads=4, head_dim=6, window=8, global_every=3)
    flops = flops_per_token(cfg, 70, length)
    row = sum(forward_flops(cfg, 70, keys) for keys in range(1, length + 1))
    assert flops["forward"] * length == pytest.approx(row)
    keys = sum(2 * min(i, 8) + i for i in range(1, length + 1))
    products = 2 * parameters(cfg, 70, 0)["matrices"] * length + 4 * 4 * 6 * keys
    assert flops["causal"] * length == pytest.approx(3 * products)
    assert flops["causal"] == pytest.approx(3 * flops["forward"])
    assert flops["palm"] - flops["6n"] == pytest.approx(12 * 4 * 6 * (2 * min(8, length) + length))


# What the settings refuse


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": "blockwise", "dropout": 0.1},
            "model.dropout=0.1: wanted 0 .*set --model.dropout 0 or --model.a",
        ),
        ({"rope_scaling": "yarn", "rope_factor": 2.0}, "model.rope_scaling='yarn': .*set --model.positions rope"),
        ({"positions": "rope", "rope_factor": 2.0}, "model.rope_factor=2.0: wanted 1 .*set --model.rope-scaling"),
        ({"positions": "rope", "rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor=0.5: wanted at least 1"),
        ({"positions": "rope", "rope_scaling": "yarn"}, "model.rope_original_length=0: wanted the context"),
        ({"positions": "rope", "rope_original_length": 64}, "model.rope_original_length=64: wanted 0"),
        (
            {"positions": "rope", "rope_scaling": "yarn", "rope_original_length": 8, "rope_theta": 1.0},
            "model.rope_theta=1.0: wanted more than 1",
        ),
        ({"global_every": 2}, "model.global_every=2: wanted 0 .*set --model.window"),
        ({"qkv_biases": True}, "model.qkv_biases=True: wanted False where model.biases=True has them"),
        ({"positions": "rope", "rope_theta_local": 1e4}, "model.rope_theta_local=10000.0: .*set --model.window"),
        ({"logit_scale": 0.0}, "model.logit_scale=0.0"),
        ({"window": 4, "global_every": 3}, "model.global_every=3: wanted at most model.num_layers=2"),
        ({"remat_names": ("attention", "keys")}, "model.remat_names=.*wanted one or more of query, key, value"),
        ({"remat_names": ()}, "model.remat_names=.*wanted one or more"),
        ({"remat_names": ("mlp", "mlp")}, "model.remat_names=.*each once"),
        ({"window": -1}, "model.window=-1"),
        ({"attention_block": 0}, "model.attention_block=0"),
    ],
)
def test_settings_that_would_be_ignored_or_make_no_sense_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GPT2, **change)

"""Laws of import: the logits are those of the original, and nothing that would change them is ever ignored."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.config.section import InputError
from gptjax.interop.huggingface import import_huggingface
from gptjax.model.decoder import Decoder

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("tiny_random_gpt2", "tiny_random_llama", "tiny_random_mistral", "tiny_random_qwen3", "tiny_random_qwen2",
            "tiny_random_nanochat", "tiny_random_cohere", "tiny_random_gemma2", "tiny_random_gemma3_text")  # fmt: skip
WINDOWS = {"mistral": 7, "qwen2": 7, "gemma2": 7, "gemma3_text": 7}
NORMED = ("qwen3", "nanochat", "gemma3_text")


def logits(imported, ids_BL: np.ndarray) -> np.ndarray:
    cfg, vocab_size, context, params = imported
    decoder = Decoder(cfg, vocab_size, context)

    @jax.jit
    def forward(params, ids_BL):
        position_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1]), ids_BL.shape)
        x_BLD, _ = decoder.apply({"params": params}, ids_BL, position_BL, jnp.ones_like(ids_BL))
        return decoder.apply({"params": params}, x_BLD, method="logits")

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, ids_BL))


def variant(tmp_path: Path, family: str, settings=None, change=lambda tensors: tensors) -> Path:
    """A copy of a fixture with other settings ("absent" removes one) and with `change` applied to its tensors."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    config = json.loads((FIXTURES / family / "config.json").read_text()) | (settings or {})
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = change(load_file(FIXTURES / family / "model.safetensors"))
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def rope(kind: str, **values) -> dict:
    """The settings of rotary positions of this kind."""
    return {"rope_parameters": {"rope_type": kind} | values}


def assert_same(a, b):
    assert a[:3] == b[:3]
    jax.tree.map(np.testing.assert_array_equal, a[3], b[3])


# What comes out


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_has_the_logits_of_the_original(family):
    reference = np.load(FIXTURES / family / "reference.npz")
    imported = cfg, *sizes, params = import_huggingface(FIXTURES / family)
    width, kind = 64 if family in FAMILIES[:2] else 32 if family in FAMILIES[:4] else 16, family[12:]
    assert (cfg.width, *sizes) == (width, 512 if width == 64 else 64, 64)
    assert (cfg.num_layers, cfg.window, cfg.qk_norm) == (
        2 + (kind in ("qwen2", "gemma3_text")),
        WINDOWS.get(kind, 0),
        kind in NORMED,
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    got_BLV = logits(imported, reference["ids"])
    difference = np.abs(got_BLV - reference["logits"]).max()
    print(f"{family}: max abs difference {difference:.2e} of logits up to {np.abs(reference['logits']).max():.2f}")
    assert difference <= 1e-5
    assert reference["logits"].std() > 0.01  # and they are not all alike


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_shards_give_what_one_file_gives(tmp_path, family):
    folder = variant(tmp_path, family)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: x for name, x in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(import_huggingface(folder), import_huggingface(FIXTURES / family))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_weights_become_the_same_numbers_in_float32(tmp_path, dtype):
    name = np.dtype(dtype).name

    def stored(last):
        change = lambda tensors: {n: x.astype(dtype).astype(last) for n, x in tensors.items()}  # noqa: E731
        return import_huggingface(variant(tmp_path, FAMILIES[1], {"dtype": name}, change))

    assert_same(stored(dtype), stored(np.float32))
    assert stored(dtype)[0].dtype == ("bfloat16" if name == "bfloat16" else "float32")


def test_a_vocabulary_that_is_padded_gives_the_same_logits(tmp_path):
    def cut(tensors):
        return {n: x[:500] if x.shape[0] == 512 else x for n, x in tensors.items()}

    imported = import_huggingface(variant(tmp_path, FAMILIES[1], {"vocab_size": 500}, cut))
    reference = np.load(FIXTURES / FAMILIES[1] / "reference.npz")
    ids_BL = reference["ids"] % 500
    got_BLV = logits(imported, ids_BL)
    want_BLV = logits(import_huggingface(FIXTURES / FAMILIES[1]), ids_BL)
    assert got_BLV.shape[-1] == 512 and (got_BLV[..., 500:] < -1e29).all()
    np.testing.assert_allclose(got_BLV[..., :500], want_BLV[..., :500], atol=1e-5)
    assert not imported[3]["embed_VD"][500:].any() and not imported[3]["head_VD"][500:].any()


def test_files_of_the_bare_model_and_saved_constants_change_nothing(tmp_path):
    def bare(tensors):
        tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        return tensors | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.1.attn.masked_bias": np.ones((), "f4")}

    folder = variant(tmp_path, FAMILIES[0], change=bare)
    assert_same(import_huggingface(folder), import_huggingface(FIXTURES / FAMILIES[0]))


def test_tied_and_untied_heads_are_told_apart(tmp_path):
    embed = "transformer.wte.weight"
    own = {"tie_word_embeddings": False}
    untied = variant(tmp_path, FAMILIES[0], own, lambda t: t | {"lm_head.weight": 2 * t[embed]})
    cfg, *_, params = import_huggingface(untied)
    assert not cfg.tied
    np.testing.assert_array_equal(params["head_VD"], 2 * params["embed_VD"])
    # Some files repeat the tied head; the copy is accepted where it is one.
    copy = variant(tmp_path, FAMILIES[0], change=lambda t: t | {"lm_head.weight": t[embed]})
    assert_same(import_huggingface(copy), import_huggingface(FIXTURES / FAMILIES[0]))
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"lm_head.weight": 2 * tensors[embed]}, copy / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings is true, but lm_head.weight differs"):
        import_huggingface(copy)


def test_llama_biases_land_where_they_belong(tmp_path):
    def biased(tensors):
        new = {n.replace("weight", "bias"): x[:, 0] + 1 for n, x in tensors.items() if "_proj" in n}
        return tensors | new

    settings = {"attention_bias": True, "mlp_bias": True}
    cfg, *_, params = import_huggingface(variant(tmp_path, FAMILIES[1], settings, biased))
    tensors = load_file(FIXTURES / FAMILIES[1] / "model.safetensors")
    for name, there in (("k_bias_NGK", "self_attn.k_proj"), ("w_out_bias_ND", "mlp.down_proj")):
        want = np.stack([tensors[f"model.layers.{n}.{there}.weight"][:, 0] + 1 for n in range(2)])
        np.testing.assert_array_equal(params["layers"][name].reshape(2, -1), want)


def test_older_and_newer_places_of_the_rotary_base_and_a_window_of_null_are_read(tmp_path):
    assert import_huggingface(variant(tmp_path, FAMILIES[2], {"sliding_window": None}))[0].window == 0
    for settings, theta in (
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
        (rope("default", rope_theta=2e4), 2e4),
        ({"rope_parameters": None, "rope_scaling": None}, 1e4),
    ):
        assert import_huggingface(variant(tmp_path, FAMILIES[1], settings))[0].rope_theta == theta


def test_older_files_of_gemma3_say_the_same_of_their_positions_and_windows(tmp_path):
    """In keys of their own, as the first checkpoints have them; defaults are those of transformers."""
    family = FAMILIES[8]
    older = {"rope_parameters": "absent", "rope_theta": 1e5, "rope_local_base_freq": 1e3,
             "rope_scaling": {"rope_type": "linear", "factor": 4.0}}  # fmt: skip
    assert_same(import_huggingface(variant(tmp_path, family, older)), import_huggingface(FIXTURES / family))
    pattern = import_huggingface(
        variant(tmp_path, family, {"layer_types": "absent", "sliding_window_pattern": 2, "rope_parameters": None})
    )[0]
    assert (pattern.global_every, pattern.rope_theta, pattern.rope_theta_local) == (2, 1e6, 1e4)
    every = import_huggingface(variant(tmp_path, family, {"layer_types": "absent", "rope_parameters": None}))[0]
    assert every.layer_windows == (7, 7, 7)  # the sixth would be the first without


SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_positions_have_the_logits_of_transformers(tmp_path, kind):
    imported = import_huggingface(variant(tmp_path, FAMILIES[1], rope(kind, rope_theta=1e4, **SCALED[kind])))
    assert (imported[0].rope_scaling, imported[0].rope_factor) == (kind, 4.0)
    want_BLV = np.load(FIXTURES / FAMILIES[1] / "scaled.npz")[kind]
    ids_BL = np.load(FIXTURES / FAMILIES[1] / "reference.npz")["ids"]
    assert np.abs(logits(imported, ids_BL)[..., :32] - want_BLV).max() <= 1e-5
    unscaled_BLV = np.load(FIXTURES / FAMILIES[1] / "reference.npz")["logits"][..., :32]
    assert np.abs(unscaled_BLV - want_BLV).max() > 1e-3
    # The older place and name, with what older files say beside it.
    older = {"type": kind, "beta_fast": None} if kind == "yarn" else {"type": kind}
    settings = {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": older | SCALED[kind]}
    assert import_huggingface(variant(tmp_path, FAMILIES[1], settings))[0] == imported[0]


# What is refused

YARN = {"rope_theta": 1e4} | SCALED["yarn"]


@pytest.mark.parametrize(
    "family, settings, message",
    [
        (0, {"model_type": "bert"}, "model_type='bert' .* wanted 'gpt2' or 'llama' or 'mistral' or 'qwen3' or "),
        (0, {"model_type": None}, "model_type=None"),
        (0, {"activation_function": "gelu"}, "activation_function='gelu' is not supported; wanted 'gelu_new'"),
        (0, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (0, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (0, {"add_cross_attention": True}, "add_cross_attention=True"),
        (0, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (0, {"auto_map": {"AutoModel": "x.py"}}, "auto_map="),
        (0, {"n_layer": "2"}, "n_layer='2' is not supported; wanted a whole number"),
        (0, {"n_layer": 3}, r"tensor transformer.h.2.attn.c_attn.* is missing"),
        (0, {"n_layer": 1}, "no place for tensor transformer.h.1.attn.c_attn.bias, .* and 9 more"),
        (0, {"n_head": 3}, "model.width=64: wanted a multiple of model.num_heads=3"),
        (0, {"n_positions": 32}, r"tensor transformer.wpe.weight has shape \[64, 64\]; wanted \[32, 64\]"),
        (0, {"n_inner": 100}, r"mlp.c_fc.* has shape .*; wanted"),
        (1, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling={'rope_type': 'llama3'"),
        (1, rope("longrope", factor=2.0), "rope_parameters={.*wanted null, or rope_type"),
        (1, rope("dynamic", factor=2.0), "rope_parameters={'rope_type': 'dynamic'"),
        (1, {"rope_parameters": ["linear"]}, r"rope_parameters=\['linear'\]"),
        (1, rope("default", partial_rotary_factor=0.5), "rope_parameters.partial_rotary"),
        (1, rope("linear"), "rope_parameters={.*wanted factor in it"),
        (1, rope("linear", factor=0.5), "rope_parameters.factor=0.5 .* at least 1"),
        (1, rope("linear", factor="4"), "rope_parameters.factor='4'"),
        (1, rope("linear", factor=4, original_max_position_embeddings=16), "original_max.*=16 .* no such key for 'lin"),
        (1, rope("yarn", **YARN, beta_fast=16), "rope_parameters.beta_fast=16 .* wanted 32"),
        (1, rope("yarn", **YARN, beta_slow=True), "rope_parameters.beta_slow=True .* wanted 1"),
        (1, rope("yarn", **YARN, attention_factor=2.0), "rope_parameters.attention_factor=2.0"),
        (1, rope("yarn", **YARN, mscale=1.0), "rope_parameters.mscale=1.0"),
        (1, rope("yarn", **YARN, finetuned=True), "rope_parameters.finetuned=True .* no such key for 'yarn'"),
        (1, rope("yarn", **YARN, type="linear"), "rope_parameters.type='linear' .* wanted 'yarn'"),
        (1, rope("yarn", **YARN | {"original_max_position_embeddings": 0}), "rope_parameters.original_max_po.*=0"),
        (1, {"rope_scaling": {"rope_type": "yarn"} | YARN}, "rope_scaling={.*the same as rope_parameters"),
        (1, {"original_max_position_embeddings": 16}, "original_max_position_embeddings=16"),
        (1, {"rope_theta": -1.0}, "rope_theta=-1.0"),
        (1, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (1, {"attention_bias": True}, "mlp_bias=False is not supported; wanted the same as attention_bias=True"),
        (1, {"attention_bias": True, "mlp_bias": True}, r"tensor model.layers.0.*\.bias is missing"),
        (1, {"head_dim": 32}, r"q_proj.weight has shape \[64, 64\]; wanted \[128, 64\]"),
        (1, {"head_dim": 15}, "model.head_dim=15: wanted an even head size"),
        (1, {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        (1, {"num_key_value_heads": 4}, r"k_proj.weight has shape \[32, 64\]; wanted \[64, 64\]"),
        (1, {"rms_norm_eps": 0}, "rms_norm_eps=0"),
        (1, {"dtype": "float8"}, "dtype='float8'"),
        (1, {"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
        (2, {"sliding_window": 0}, "sliding_window=0 is not supported; wanted a whole number above 0"),
        (2, {"sliding_window": "absent"}, "sliding_window is missing; wanted its value, or null"),
        (2, {"num_key_value_heads": None}, "num_key_value_heads=None"),
        (2, {"layer_types": ["full_attention"] * 2}, "layer_types="),
        (3, {"head_dim": None}, "head_dim=None"),
        (
            3,
            {"use_sliding_window": True, "layer_types": None, "max_window_layers": 1},
            "layer_types=.*in every k-th one",
        ),
        (
            3,
            {"use_sliding_window": True, "layer_types": ["chunked"] * 2},
            "layer_types=.*for each layer 'full_attention'",
        ),
        (4, {"num_key_value_heads": None}, "num_key_value_heads=None"),
        (4, {"sliding_window": None}, "sliding_window=None"),
        (5, {"hidden_act": "silu"}, "hidden_act='silu' is not supported; wanted 'relu2'"),
        (5, {"attention_bias": True}, "attention_bias=True"),
        (
            5,
            rope("yarn", **{"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}),
            "wanted no yarn",
        ),
        (6, {"use_qk_norm": True}, "use_qk_norm=True"),
        (6, {"logit_scale": 0}, "logit_scale=0 is not supported; wanted a number above 0"),
        (6, {"attention_bias": True}, "attention_bias=True"),
        (7, {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        (7, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (7, {"attention_bias": True}, "attention_bias=True"),
        (7, {"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0"),
        (7, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar=-1"),
        (8, {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping=2.0 is not supported; wanted None"),
        (
            8,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters=.*those of full_attention",
        ),
        (
            8,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention not sc",
        ),
        (8, {"model_type": "gemma3"}, "model_type='gemma3' .* or 'gemma3_text'"),
        (3, {"attention_bias": True}, "attention_bias=True"),
        (3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        (3, {"model_type": "llama"}, "no place for tensor model.layers.0.self_attn.k_norm.weight"),
    ],
)
def test_what_can_not_be_expressed_is_refused_by_name(tmp_path, family, settings, message):
    with pytest.raises(InputError, match=message):
        import_huggingface(variant(tmp_path, FAMILIES[family], settings))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, "tensor lm_head.weight is missing"),
        (lambda t: t | {"score.weight": np.ones((2, 64), "f4")}, "no place for tensor score.weight"),
        (lambda t: t | {"model.norm.weight": np.ones(64, np.int8)}, "model.norm.weight has type I8; wanted F32"),
        (lambda t: t | {"model.norm.weight": np.ones(63, "f4")}, r"model.norm.weight has shape \[63\]; wanted \[64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        import_huggingface(variant(tmp_path, FAMILIES[1], change=change))


def test_folders_that_hold_no_model_say_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="holds no config.json; wanted a Hugging Face folder"):
        import_huggingface(tmp_path / "absent")
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(InputError, match="config.json can't be read as JSON"):
        import_huggingface(tmp_path)
    config.write_text("[]")
    with pytest.raises(InputError, match="config.json: wanted a JSON object, got a list"):
        import_huggingface(tmp_path)
    shutil.copy(FIXTURES / FAMILIES[0] / "config.json", config)
    with pytest.raises(InputError, match="holds no model.safetensors; wanted it beside config.json"):
        import_huggingface(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickled weights are never read"):
        import_huggingface(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((FIXTURES / FAMILIES[0] / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match="model.safetensors can't be read"):
        import_huggingface(tmp_path)


@pytest.mark.parametrize("weight_map", [{"a": "../model.safetensors"}, {"a": 3}, [], {}, {"a": ""}])
def test_an_index_may_only_name_files_beside_it(tmp_path, weight_map):
    folder = variant(tmp_path, FAMILIES[0])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="weight_map"):
        import_huggingface(folder)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match=r"pip install 'gptjax\[hf\]'"):
        import_huggingface(FIXTURES / FAMILIES[0])

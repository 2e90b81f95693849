"""The model's options against transformers and torch: frequencies, attention, and the logits of whole models.

    pip install torch transformers && pytest tests/test_transformers.py -m peers

`python tests/test_transformers.py` writes again what the tests that need neither read from tests/fixtures.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_interop import FIXTURES, SCALED, rope
from test_interop import logits as imported_logits

from gptjax.interop.huggingface import import_huggingface
from gptjax.model.decoder import logits

pytestmark = pytest.mark.peers
VALUES = FIXTURES / "transformers.json"

# model.rope_scaling, head size, theta, factor, original context.
ROPES = [
    ("none", 16, 10_000.0, 1.0, 0),
    ("linear", 16, 10_000.0, 4.0, 0),
    ("yarn", 16, 10_000.0, 4.0, 2048),
    ("yarn", 64, 150_000.0, 32.0, 4096),
    ("yarn", 8, 10_000.0, 2.0, 16),
    ("llama3", 128, 500_000.0, 8.0, 8192),
    ("llama3", 16, 10_000.0, 32.0, 64),
]


def their_rope(scaling: str, size: int, theta: float, factor: float, original: int) -> tuple[list[float], float]:
    """transformers' own frequencies and attention factor for these settings."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    context = round(factor * original or 64)
    base = {"hidden_size": 2 * size, "num_attention_heads": 2, "max_position_embeddings": context}
    values = {"rope_type": scaling, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    if scaling == "none":
        made = LlamaRotaryEmbedding(LlamaConfig(**base))
        return made.inv_freq.tolist(), made.attention_scaling
    if scaling == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(**base, rope_parameters={k: v for k, v in values.items() if v != 0})
    made = ROPE_INIT_FUNCTIONS[scaling](config, "cpu")
    return made[0].tolist(), float(made[1])


def wave(*shape: int, seed: int) -> np.ndarray:
    """Numbers that every version of NumPy draws alike."""
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


def their_attention(window: int, softcap: float) -> np.ndarray:
    """Gemma 2's attention of q_BLHK, k_BLGK, v_BLGK (those of `attention_inputs`) over a window, as out_BLHK."""
    import torch
    from transformers import Gemma2Config
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = (torch.tensor(x).transpose(1, 2) for x in attention_inputs())
    config = Gemma2Config(sliding_window=window or None, attn_implementation="eager")
    positions = torch.arange(q.shape[2])[None]
    make = create_sliding_window_causal_mask if window else create_causal_mask
    embeds = torch.zeros(1, q.shape[2], 8)
    mask = make(config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=positions)
    groups = torch.nn.Module()
    groups.num_key_value_groups = 2
    with torch.no_grad():
        more = {"scaling": q.shape[-1] ** -0.5, "softcap": softcap or None}
        return eager_attention_forward(groups, q, k, v, mask, **more)[0].numpy()


def attention_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q_BLHK, k_BLGK, v_BLGK of 10 places and 4 heads in 2 groups; the scores reach beyond a cap of 2."""
    return 2 * wave(1, 10, 4, 6, seed=1), 2 * wave(1, 10, 2, 6, seed=2), wave(1, 10, 2, 6, seed=3)


ATTENTIONS = [(0, 0.0), (0, 2.0), (4, 0.0), (4, 2.0)]


def save_model(folder: Path, config, scale: float = 8.0):
    """A random model with weights `scale` times those of its initialisation, so that its logits are of order 1."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                x += 0.1 * torch.randn_like(x)
            else:
                x *= scale
    model.save_pretrained(folder)
    return model


def their_logits(model, ids_BL: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids_BL)).logits.numpy()


def our_logits(imported, ids_BL: np.ndarray) -> np.ndarray:
    return imported_logits(imported, ids_BL)[..., : imported[1]]


def small(family: str, **values):
    """A config of two layers, width 32 and 64 token ids."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    return AutoConfig.for_model(family, **sizes | values)


def token_ids(length: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (2, length))


def close(got: np.ndarray, want: np.ndarray) -> None:
    difference = np.abs(got - want).max()
    print(f"max abs difference {difference:.2e} of values up to {np.abs(want).max():.2f}")
    assert difference <= 1e-5 and want.std() > 0.1


# Frequencies and attention


def test_capped_logits_are_those_of_gemma2(tmp_path):
    import torch

    model = save_model(tmp_path, small("gemma2", head_dim=8, final_logit_softcapping=2.0))
    want = their_logits(model, token_ids())
    with torch.no_grad():
        x_BLD = model.model(torch.tensor(token_ids())).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        got = logits(jnp.asarray(x_BLD), jnp.asarray(model.lm_head.weight.detach().numpy()), 64, softcap=2.0)
    assert 1.9 < np.abs(want).max() <= 2
    close(np.asarray(got), want)


# Whole models


LLAMA = {kind: rope(kind, rope_theta=1e4, **values) for kind, values in SCALED.items()}
UNSCALED = {"rope_scaling": "none", "rope_factor": 1.0, "rope_original_length": 0}


@pytest.mark.parametrize(
    ("family", "settings", "options", "others", "least"),
    [
        *(("llama", LLAMA[kind], {"rope_scaling": kind}, UNSCALED, 0.1) for kind in SCALED),
        ("mistral", {"sliding_window": 7}, {"window": 7}, {"window": 8}, 0.01),
        ("qwen3", {"tie_word_embeddings": True}, {"qk_norm": True, "tied": True}, None, 0),
    ],
)
def test_a_model_with_an_option_of_its_family_has_their_logits(tmp_path, family, settings, options, others, least):
    """And other values of these options are `least` away, so that they matter."""
    model = save_model(tmp_path, small(family, head_dim=16, **settings))
    imported = import_huggingface(tmp_path)
    assert {name: getattr(imported[0], name) for name in options} == options
    want = their_logits(model, token_ids())
    close(our_logits(imported, token_ids()), want)
    if others:
        other = dataclasses.replace(imported[0], **others)
        assert abs(our_logits((other, *imported[1:]), token_ids()) - want).max() > least


# Random models of every family, both ways


def random_settings(kind: str, rng: np.random.Generator) -> dict:
    """Values of a small config.json of this family, with its options drawn."""
    from gptjax.interop.families import FAMILIES as KNOWN

    assert kind in KNOWN
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    heads, layers, context = pick(1, 2, 4), int(rng.integers(1, 5)), 64
    width, vocab = heads * pick(4, 6, 8), int(rng.integers(40, 80))
    tied = pick(True, False)
    if kind == "gpt2":
        return {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": pick(None, 40), "n_positions": context,
                "vocab_size": vocab, "tie_word_embeddings": tied}  # fmt: skip
    values = {
        "hidden_size": width, "intermediate_size": pick(24, 40), "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": pick(*(n for n in (1, 2, 4) if heads % n == 0)),
        "vocab_size": vocab, "max_position_embeddings": context, "tie_word_embeddings": tied, "pad_token_id": None,
    }  # fmt: skip
    if kind not in ("qwen2", "cohere", "nanochat"):  # whose heads are width / heads
        values["head_dim"] = pick(4, 6, 8)
    theta, scaled = pick(1e4, 5e5), pick("default", *SCALED)
    scaled = "default" if kind == "nanochat" and scaled == "yarn" else scaled
    parameters = {"rope_type": scaled, "rope_theta": theta} | SCALED.get(scaled, {})
    values["rope_parameters"] = parameters
    types = pick(["full_attention"] * layers, ["sliding_attention"] * layers,
                 ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)])  # fmt: skip
    if kind == "llama":
        values |= dict.fromkeys(("attention_bias", "mlp_bias"), pick(True, False))
    if kind == "mistral":
        values["sliding_window"] = pick(None, 7)
    if kind in ("qwen2", "qwen3"):
        local = "sliding_attention" in types
        values |= {"layer_types": types, "use_sliding_window": local, "sliding_window": 7 if local else None}
    if kind == "nanochat":
        values["final_logit_softcapping"] = pick(15.0, 2.0, None)
    if kind == "cohere":
        values["logit_scale"] = pick(0.0625, 0.3)
    if kind.startswith("gemma"):
        values |= {"layer_types": types, "sliding_window": 7, "query_pre_attn_scalar": pick(8, 10)}
        values["final_logit_softcapping"] = pick(2.0, 30.0, None)
    if kind == "gemma2":
        values["attn_logit_softcapping"] = pick(2.0, 50.0, None)
    if kind == "gemma3_text":
        near = {"rope_type": "default", "rope_theta": pick(1e3, theta)}
        values["rope_parameters"] = {"full_attention": parameters, "sliding_attention": near}
    return values


@pytest.mark.parametrize("number", range(54))
def test_a_random_model_has_their_logits_and_opens_there_again(tmp_path, number):
    """Theirs read by us; its tensors written again, equal bit by bit; and ours, with parameters drawn, read by them."""
    import torch
    from safetensors.numpy import load_file
    from test_families import save
    from test_model_options import random_params
    from transformers import AutoConfig, AutoModelForCausalLM

    from gptjax.interop.families import FAMILIES as KNOWN

    kind, rng = list(KNOWN)[number % len(KNOWN)], np.random.default_rng(number)
    config = AutoConfig.for_model(kind, **random_settings(kind, rng))
    theirs = save_model(tmp_path / "theirs", config)
    imported = cfg, vocab_size, context, _ = import_huggingface(tmp_path / "theirs")
    ids_BL = rng.integers(0, vocab_size, (2, 30))
    relative(our_logits(imported, ids_BL), their_logits(theirs, ids_BL))

    again = load_file(save(tmp_path / "again", imported, KNOWN[kind]) / "model.safetensors")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert again.keys() == stored.keys()
    for name, x in stored.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)

    drawn = random_params(cfg, vocab_size, context)
    smaller = jax.tree_util.tree_map_with_path(lambda path, x: x if "norm" in path[-1].key else x / 2, drawn)
    ours = (cfg, vocab_size, context, smaller)
    folder = save(tmp_path / "ours", ours)
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    relative(their_logits(opened, ids_BL), our_logits(ours, ids_BL))


def relative(got: np.ndarray, want: np.ndarray) -> None:
    difference, largest = np.abs(got - want).max(), np.abs(want).max()
    print(f"max abs difference {difference:.2e} of logits up to {largest:.2f}: {difference / largest:.1e}")
    assert difference <= 1e-5 * largest and want.std() > 0.01


# What the tests without torch read


def test_the_stored_values_are_theirs():
    stored = json.loads(VALUES.read_text())
    for made, kept in zip(values()["ropes"], stored["ropes"], strict=True):
        assert made["settings"] == kept["settings"]
        np.testing.assert_allclose(made["frequency"], kept["frequency"], rtol=1e-6)
    for made, kept in zip(values()["attentions"], stored["attentions"], strict=True):
        np.testing.assert_allclose(made["out_BLHK"], kept["out_BLHK"], atol=1e-6)


def values() -> dict:
    ropes = [(s, *their_rope(*s)) for s in ROPES]
    return {
        "ropes": [{"settings": list(s), "frequency": f, "temperature": t} for s, f, t in ropes],
        "attentions": [
            {"window": w, "softcap": c, "out_BLHK": np.round(their_attention(w, c), 7).tolist()} for w, c in ATTENTIONS
        ],
    }


SLIDING_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
SMALLER = {
    "qwen2": {"tie_word_embeddings": True, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7,
              "layer_types": SLIDING_FULL},
    "nanochat": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 7, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 2.0},
    "gemma3_text": {
        "head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 7, "num_hidden_layers": 3,
        "layer_types": SLIDING_FULL, "tie_word_embeddings": False,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}},
    },
}  # fmt: skip


def write_fixture(family: str, config, ids_BL: np.ndarray) -> None:
    folder = FIXTURES / f"tiny_random_{family}"
    model = save_model(folder, config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "reference.npz", ids=ids_BL, logits=their_logits(model, ids_BL))


def main() -> None:
    """Writes the fixtures: values of functions, small models, and logits of another with scaled positions."""
    import transformers

    VALUES.write_text(json.dumps({"transformers": transformers.__version__} | values()))
    for family, more in (("mistral", {"sliding_window": 7}), ("qwen3", {"tie_word_embeddings": True})):
        write_fixture(family, small(family, head_dim=12, **more), token_ids())
    for family, more in SMALLER.items():
        sizes = {"hidden_size": 16, "intermediate_size": 24, "pad_token_id": None}
        write_fixture(family, small(family, **sizes | more), token_ids(20))
    llama = FIXTURES / "tiny_random_llama"
    ids_BL = np.load(llama / "reference.npz")["ids"]
    scaled = {}
    for kind, settings in LLAMA.items():
        config = transformers.LlamaConfig.from_pretrained(llama, **settings)
        model = transformers.AutoModelForCausalLM.from_pretrained(llama, config=config).eval()
        scaled[kind] = their_logits(model, ids_BL)[..., :32]
    np.savez(llama / "scaled.npz", **scaled)


if __name__ == "__main__":
    main()

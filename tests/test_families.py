"""Laws of model families: what is imported is exported again bit by bit, and an export says what a decoder computes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shipped import EVERY, recipe
from test_interop import FAMILIES, FIXTURES, logits
from test_model_options import random_params

from gptjax.config import ModelConfig
from gptjax.config.section import InputError
from gptjax.interop.families import ModelFamily, family_of
from gptjax.interop.huggingface import import_huggingface
from gptjax.interop.layout import written_tensors
from gptjax.model.decoder import Decoder

VOCAB, LENGTH = 50, 12
PLAIN = ModelConfig(num_layers=2, width=16, num_heads=4, dtype="float32", init_std=0.3)
LLAMA = dataclasses.replace(PLAIN, positions="rope", norm="rmsnorm", activation="swiglu", biases=False)


def save(folder: Path, imported, family: ModelFamily | None = None) -> Path:
    """Writes a model as a folder of a family, or else of the first one that can express it."""
    cfg, vocab_size, context, params = imported
    family, decoder = family or family_of(cfg, vocab_size, context), Decoder(cfg, vocab_size, context)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.write(cfg, vocab_size, context)))
    tensors = {}
    for name, shape, make in written_tensors(family, decoder, params):
        tensors[name] = make()
        assert tensors[name].shape == shape and tensors[name].dtype == np.float32, name
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_of_an_import_has_the_same_tensors(tmp_path, family):
    imported = import_huggingface(FIXTURES / family)
    got = load_file(save(tmp_path / "out", imported) / "model.safetensors")
    want = load_file(FIXTURES / family / "model.safetensors")
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x.astype(np.float32), err_msg=name)
    written, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", FIXTURES / family))
    assert written["model_type"] == original["model_type"] and written["architectures"] == original["architectures"]
    assert import_huggingface(tmp_path / "out")[0] == imported[0]


EXPORTED = {
    "gpt2 without biases": dataclasses.replace(PLAIN, biases=False),
    "muP in gpt2": dataclasses.replace(PLAIN, mup_base_width=8),
    "muP, untied": dataclasses.replace(LLAMA, mup_base_width=4, tied=False, queries_per_kv=2, biases=True),
    "muP, normalised queries": dataclasses.replace(LLAMA, mup_base_width=8, qk_norm=True),
    "yarn": dataclasses.replace(LLAMA, rope_scaling="yarn", rope_factor=4.0, rope_original_length=16, window=5),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_model_has_the_logits_of_the_decoder(tmp_path, name, highest_precision):
    cfg = EXPORTED[name]
    model = (cfg, VOCAB, LENGTH, random_params(cfg))
    ids_BL = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))
    want, got = logits(model, ids_BL), logits(import_huggingface(save(tmp_path / "out", model)), ids_BL)
    assert np.abs(got - want)[..., :VOCAB].max() <= 1e-5 * np.abs(want[..., :VOCAB]).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_softcap": 5.0}, "LlamaForCausalLM without model.logit_softcap=5.0"),
        ({"window": 4, "global_every": 2, "biases": True}, "Qwen2ForCausalLM without model.biases=True"),
        ({"block": "mine:block"}, "without model.block='mine:block'"),
        ({"activation": "gelu", "biases": True}, "LlamaForCausalLM without model.activation='gelu'"),
        ({"head_dim": 10, "positions": "learned", "norm": "layernorm", "activation": "gelu"},
         "GPT2LMHeadModel without model.head_dim=10"),
    ],
)  # fmt: skip
def test_what_no_architecture_has_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        family_of(dataclasses.replace(LLAMA, **change), VOCAB, LENGTH)


@pytest.mark.parametrize("words", EVERY)
def test_every_shipped_recipe_exports_to_an_architecture_of_transformers(words):
    config, (name, *_) = recipe(words), words.split()
    sizes = (config.tokenizer.vocab_size, config.data.length)
    family = family_of(config.model, *sizes)
    wanted = {"gpt2": "gpt2", "gpt3": "gpt2", "shakespeare_char": "gpt2", "modern": "nanochat", "ladder": "qwen3"}
    assert family.model_type == wanted.get(name, "llama")
    values = family.write(config.model, *sizes)
    assert values["architectures"] == [family.architecture] and "float32" == values["dtype"]

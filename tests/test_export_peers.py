"""Laws of exports against the programs that open them: transformers, and llama.cpp through llama-cpp-python.

pip install torch transformers llama-cpp-python && pytest tests/test_export_peers.py -m peers
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward_texts import SHAKESPEARE
from byte_pairs import END, TWO_FILES
from test_export import make_run
from test_gguf import write
from test_interop import logits

from gptjax.api import export, load
from gptjax.interop.gguf import import_gguf
from gptjax.runs.load import LoadedModel
from gptjax.tokenizer import BytesTokenizer, Tokenizer
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer

pytestmark = pytest.mark.peers

TEXTS = (
    "ROMEO.\nBut soft, what light", SHAKESPEARE[5000:5300], " a  b\n\n   c\t12345",
    "na\u00efve \u4e2d\u6587\uff0c \U0001f600 don't",
)  # fmt: skip
PAIRS, BYTES = (
    {"tokenizer.vocab_size": 702, "tokenizer.kind": "huggingface"},
    {"tokenizer.vocab_size": 258, "tokenizer.kind": "bytes"},
)
ROOM = 256
LONG = {"data.length": ROOM, "model.width": 64}
# A recipe with its tokenizer: what is changed.
MODELS = {
    "quickstart": ("quickstart", LONG),
    "quickstart with bytes": ("quickstart", LONG | BYTES),
    "shakespeare_char": ("shakespeare_char", LONG | BYTES),
    "gpt2": ("gpt2", LONG | PAIRS),
    "modern": ("modern", LONG | PAIRS | {"model.head_dim": 32, "model.mup_base_width": 32}),
    "llama_1b": ("llama_1b", LONG | PAIRS | {"model.queries_per_kv": 2, "model.head_dim": 0}),
    "biases of queries": ("quickstart", LONG | {"model.qkv_biases": True}),
    "queries normalised": ("quickstart", LONG | PAIRS | {"model.qk_norm": True, "model.queries_per_kv": 2}),
}
LLAMA_CPP = [name for name in MODELS if name not in ("modern", "llama_1b")]


def opened(folder: Path, name: str) -> LoadedModel:
    recipe, settings = MODELS[name]
    kind = settings.get("tokenizer.kind")
    byte_pairs = HuggingFaceTokenizer(TWO_FILES, END, END)
    tokenizer: Tokenizer | None = {"bytes": BytesTokenizer(), "huggingface": byte_pairs}.get(str(kind))
    if kind == "huggingface":
        settings = settings | {"tokenizer.vocab_size": byte_pairs.vocab_size}
    return load(make_run(folder, recipe, settings, tokenizer=tokenizer).folder)


def our_logits(model: LoadedModel) -> Callable[[list[int]], np.ndarray]:
    """logits_LV of ids, in rows of one length, so that one program computes them all."""

    @jax.jit
    def forward(params, ids_BL):
        x_BLD, _ = model.decoder.apply({"params": params}, ids_BL, jnp.arange(ROOM)[None], jnp.ones_like(ids_BL))
        return model.decoder.apply({"params": params}, x_BLD, method="logits")

    def logits(ids: list[int]) -> np.ndarray:
        ids_BL = np.zeros((1, ROOM), np.int32)
        ids_BL[0, : len(ids)] = ids
        return np.asarray(forward(model.params, ids_BL))[0, : len(ids), : model.config.tokenizer.vocab_size]

    return logits


# AutoTokenizer takes Qwen 2's own way to cut text, whatever tokenizer.json says: another tokenizer has other ids there.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "biases of queries"])
def test_an_export_opens_in_transformers_with_equal_logits_and_ids(tmp_path, name, highest_precision):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = opened(tmp_path / "run", name)
    export(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ends, logits = (model.tokenizer.bos_id, model.tokenizer.eos_id), our_logits(model)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == ends
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == ends
    for text in TEXTS:
        ids = model.tokenizer.prompt_ids(text)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        want_LV = logits(ids[:200])
        with torch.no_grad():
            got_LV = theirs(torch.tensor([ids[:200]])).logits[0].numpy()
        assert np.abs(got_LV - want_LV).max() <= 1e-5 * np.abs(want_LV).max()


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_a_gguf_file_opens_in_llama_cpp_with_equal_ids_and_greedy_tokens(tmp_path, name, highest_precision):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = opened(tmp_path / "run", name)
    export(model, tmp_path / "out", format="gguf")
    theirs = llama_cpp.Llama(
        str(tmp_path / "out" / "model.gguf"), n_ctx=ROOM, logits_all=True, verbose=False, n_threads=1
    )
    tokenizer, logits = model.tokenizer, our_logits(model)
    assert (theirs.token_bos(), theirs.token_eos()) == (tokenizer.bos_id, tokenizer.eos_id)
    compared = 0
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.prompt_ids(text), text
        ids = tokenizer.prompt_ids(text)[:100]
        theirs.reset()
        for token in itertools.islice(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), 20):
            last_V = logits(ids)[-1]
            best, second = np.argsort(last_V)[[-1, -2]]
            margin = last_V[best] - last_V[second]
            assert token == best or margin <= 1e-2, f"{token}, wanted {best} by {margin}"
            compared += margin > 1e-2
            ids = [*ids, token]
    assert compared > 60


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_gguf_file_of_gemma_has_the_logits_of_llama_cpp(tmp_path, family, highest_precision):
    """Within what llama.cpp's table of float16 for GELU leaves; over more tokens than the window."""
    llama_cpp = pytest.importorskip("llama_cpp")
    name = family.removesuffix("_text")
    keys = {f"{name}.vocab_size": 64, f"{name}.attention.value_length": 6}
    path = write(tmp_path / "model.gguf", family, tokenizer={"model": "no_vocab"}, keys=keys)
    ids_BL = np.random.default_rng(0).integers(0, 64, (1, 40))
    want_LV = logits(import_gguf(path)[0], ids_BL)[0, :, :64]
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **exact)
    theirs.eval(ids_BL[0].tolist())
    assert np.abs(np.array(theirs.scores[:40]) - want_LV).max() <= 1e-3 * np.abs(want_LV).max()

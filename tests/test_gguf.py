"""Laws of GGUF: the model is that of the Hugging Face folder it was made from, and a damaged file is one line."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from byte_pairs import END, MERGES, TWO_FILES, VOCAB
from safetensors.numpy import load_file
from test_interop import FIXTURES, assert_same

from gptjax.api import load
from gptjax.cli import main
from gptjax.config import GenerateConfig
from gptjax.config.section import InputError
from gptjax.generation.engine import generate_ids
from gptjax.interop.gguf import KEYS, LAYER, TOP, import_gguf, is_gguf
from gptjax.interop.huggingface import import_huggingface, set_conventions
from gptjax.tokenizer import load_tokenizer
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer

gguf = pytest.importorskip("gguf", reason="GGUF files: pip install 'gptjax[gguf]'")


def write(path: Path, family: str, *, kind=None, tokenizer: dict | None = None, keys: dict | None = None) -> Path:
    """The file that llama.cpp's converter makes of a fixture: its names, its order of rows, its keys."""
    folder, arch = FIXTURES / f"tiny_random_{family}", family
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    for key, name in KEYS.items():
        value = config.get(name)
        if name == "rope_theta":
            value = (config.get("rope_parameters") or {}).get("rope_theta", value)
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{arch}.{key}", value)
    for key, value in (keys or {}).items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for key, value in (tokenizer or {}).items():
        add = {list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[
            type(value)
        ]
        add(f"tokenizer.ggml.{key}", value)
    names = {foreign: name for name, foreign in TOP.items()}
    inner = {foreign: name for name, foreign in LAYER.items()}
    for name, x in load_file(folder / "model.safetensors").items():
        x = np.asarray(x, np.float32)
        if name.startswith("model.layers."):
            _, _, n, *stem, _ = name.split(".")
            name = f"blk.{n}.{inner['.'.join(stem)]}.weight"
            if family == "llama" and (".attn_q." in name or ".attn_k." in name):
                heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
                x = x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        else:
            name = names[name]
        if kind is not None and x.ndim == 2:
            writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_file_gives_the_model_of_the_folder_it_was_made_from(tmp_path, family):
    path = write(tmp_path / "model.gguf", family)
    assert is_gguf(path) and not is_gguf(FIXTURES / "golden.json") and not is_gguf(tmp_path)
    imported, _, reason = import_gguf(path)
    assert_same(imported, import_huggingface(FIXTURES / f"tiny_random_{family}"))
    assert "tokenizer None" in reason


@pytest.mark.parametrize(("kind", "most"), [("F16", 1e-3), ("Q8_0", 1e-2), ("Q4_1", 0.1)])
def test_quantised_weights_come_back_near_to_what_they_were(tmp_path, kind, most):
    path = write(tmp_path / "model.gguf", "llama", kind=gguf.GGMLQuantizationType[kind])
    (*_, got), *_ = import_gguf(path)
    want = import_huggingface(FIXTURES / "tiny_random_llama")[3]
    for name in ("q_NDHK", "w_out_NFD"):
        x, y = got["layers"][name], want["layers"][name]
        assert 0 < np.abs(x - y).max() <= most * np.abs(y).max()


def pieces(**more) -> dict:
    """The keys of a byte-level tokenizer of 512 ids whose last three are for control."""
    tokens = sorted(VOCAB, key=VOCAB.__getitem__)[:509]
    merges = [f"{a} {b}" for a, b in MERGES if {a, b, a + b} <= {*tokens}]
    tokens += ["<|begin|>", "<|end|>", "<|turn|>"]
    types = [1] * 509 + [3] * 3
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": merges,
            "bos_token_id": 509, "eos_token_id": 510, "eot_token_id": 511} | more  # fmt: skip


def test_the_tokenizer_its_beginning_and_its_ends_come_with_the_file(tmp_path, capsys):
    path, run = write(tmp_path / "model.gguf", "llama", tokenizer=pieces(add_bos_token=False)), tmp_path / "run"
    assert main(["import", str(path), str(run)]) == 0
    tokenizer = load_tokenizer(run / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (509, 510, (511,))
    ids = tokenizer.prompt_ids("the cat<|turn|>")
    assert ids == tokenizer.encode("the cat<|turn|>") and tokenizer.decode(ids) == "the cat<|turn|>" and 511 not in ids
    assert tokenizer.prompt_ids("") == [509]
    begins = import_gguf(write(tmp_path / "begins.gguf", "llama", tokenizer=pieces(add_bos_token=True)))[1]
    assert begins is not None and begins.prompt_ids("a")[0] == 509


def test_a_folder_says_how_prompts_begin_and_what_ends_a_text(tmp_path):
    tokenizer = HuggingFaceTokenizer(TWO_FILES, END, END)
    set_conventions(tokenizer, tmp_path)
    assert tokenizer.begins and tokenizer.stop_ids == ()
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 7, 10**6]}))
    set_conventions(tokenizer, tmp_path)
    assert not tokenizer.begins and tokenizer.stop_ids == (7,)


def test_a_character_without_a_token_is_refused_and_never_lost():
    vocab = {token: i for token, i in VOCAB.items() if token != "\u0106"}  # which stands for the byte 0x06
    files = TWO_FILES | {"vocab.json": json.dumps(vocab).encode()}
    tokenizer = HuggingFaceTokenizer(files, END, END)
    assert tokenizer.decode(tokenizer.encode("a\x07b")) == "a\x07b"
    with pytest.raises(InputError, match="text has U\\+0006, of which this tokenizer has no token; leave it out"):
        tokenizer.encode("a\x06b")
    del vocab["!"]
    with pytest.raises(InputError, match="has no token '!', which stands for a byte"):
        HuggingFaceTokenizer(files | {"vocab.json": json.dumps(vocab).encode()}, END, END)


def broken(data: bytes, kind: str) -> bytes:
    huge = (2**60).to_bytes(8, "little")
    return {
        "cut": data[: len(data) // 2],
        "head": data[:20],
        "big-endian": data[:4] + data[4:8][::-1] + data[8:],
        "tensors": data[:8] + huge + data[16:],
        "keys": data[:16] + huge + data[24:],
        "string": data[:24] + huge + data[32:],
        "noise": data[:24] + bytes(range(256)) * 8,
    }[kind]


@pytest.mark.parametrize("kind", ["cut", "head", "big-endian", "tensors", "keys", "string", "noise"])
def test_a_damaged_file_is_one_line_and_leaves_nothing(tmp_path, capsys, kind):
    path, run = write(tmp_path / "model.gguf", "llama"), tmp_path / "run"
    path.write_bytes(broken(path.read_bytes(), kind))
    assert main(["import", str(path), str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and str(path) in error and not run.exists()
    assert kind != "big-endian" or "wanted a little-endian file" in error


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"llama.expert_count": 4}, "llama.expert_count=4 is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type=yarn is not supported; wanted 'none'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 with heads of 16"),
    ],
)
def test_what_the_decoder_can_not_represent_is_refused_by_name(tmp_path, keys, said):
    with pytest.raises(InputError, match=said.replace(".", "\\.")):
        import_gguf(write(tmp_path / "model.gguf", "llama", keys=keys))


@pytest.mark.slow
def test_smollm2_has_the_logits_and_the_text_that_transformers_gives(tmp_path, highest_precision):
    """The reference was computed by transformers in float32, from the same file dequantised."""
    reference = Path(os.environ.get("GPTJAX_SHARED_DATA", "")) / "weights" / "smollm2_135m_instruct_reference.npz"
    path = Path(os.environ.get("GPTJAX_SMOLLM2", ""))
    if not reference.is_file() or not path.is_file():
        pytest.skip("GPTJAX_SHARED_DATA and GPTJAX_SMOLLM2 (SmolLM2-135M-Instruct.Q4_1.gguf) name no files")
    assert main(["import", str(path), str(tmp_path / "run")]) == 0
    want, model = np.load(reference), load(tmp_path / "run")
    for i in range(2):
        ids = want[f"ids{i}"]
        assert model.tokenizer.prompt_ids(str(want[f"prompt{i}"])) == ids.tolist()
        params, rows = jax.device_get(model.params), (ids[None], np.arange(len(ids))[None], np.ones_like(ids)[None])
        x_BLD, _ = model.decoder.apply({"params": params}, *rows)
        logits_LV = np.asarray(model.decoder.apply({"params": params}, x_BLD, method="logits"))[0]
        assert np.abs(logits_LV[-1, want[f"top64_ids{i}"]] - want[f"top64_logits{i}"]).max() < 2e-4
        log_probs_LV = np.asarray(jax.nn.log_softmax(logits_LV))
        assert np.abs(log_probs_LV[np.arange(len(ids) - 1), ids[1:]] - want[f"logprob_next{i}"]).max() < 1e-4
        greedy, stops = GenerateConfig(max_new_tokens=32, temperature=0.0), (model.tokenizer.eos_id,)
        (new,) = generate_ids(model.decoder, params, [ids.tolist()], greedy, stop_ids=stops)
        assert [*ids, *new] == want[f"greedy{i}"].tolist()

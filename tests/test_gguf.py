"""Laws of GGUF: the model is that of the Hugging Face folder it was made from, and a damaged file is one line."""

import dataclasses
import functools
import json
import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from awkward_texts import AWKWARD, sentencepiece_model
from awkward_texts import SHAKESPEARE as TEXT
from byte_pairs import END, MERGES, TWO_FILES, VOCAB
from safetensors.numpy import load_file
from test_interop import FIXTURES, assert_same

from gptjax.api import load
from gptjax.cli import main
from gptjax.config import GenerateConfig
from gptjax.config.section import InputError
from gptjax.generation import chat
from gptjax.generation.engine import generate_ids
from gptjax.interop.gguf import import_gguf, is_gguf
from gptjax.interop.gguf_keys import tokenizer_keys
from gptjax.interop.gguf_names import ARCHITECTURES
from gptjax.interop.gguf_tokenizer import read_tokenizer
from gptjax.interop.huggingface import import_huggingface
from gptjax.tokenizer import SentencePieceTokenizer, load_tokenizer
from gptjax.tokenizer.export import write_tokenizer
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer
from gptjax.tokenizer.known_templates import template_of

gguf = pytest.importorskip("gguf", reason="GGUF files: pip install 'gptjax[gguf]'")


def write(path: Path, family: str, *, kind=None, tokenizer: dict | None = None, keys: dict | None = None) -> Path:
    """The file that llama.cpp's converter makes of a fixture: its names, its order of rows, its keys."""
    folder = FIXTURES / f"tiny_random_{family}"
    config = json.loads((folder / "config.json").read_text())
    architecture = next(one for one in ARCHITECTURES.values() if one.family == family)
    arch = architecture.name
    writer = gguf.GGUFWriter(path, arch)
    for key, name in architecture.keys.items():
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
    for name, x in load_file(folder / "model.safetensors").items():
        x = np.asarray(x, np.float32)
        name = architecture.stored(name)
        if arch.startswith("gemma") and "norm" in name:
            x = x + 1
        if family == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            x = x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
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


def gemma(folder: Path, family: str) -> Path:
    """The fixture with what no key says, as llama.cpp takes it: the scores' divisor, the order of the layers."""
    folder.mkdir()
    given = json.loads((FIXTURES / f"tiny_random_{family}" / "config.json").read_text())
    given |= {"query_pre_attn_scalar": 6, "layer_types": None, "rope_parameters": None}
    (folder / "config.json").write_text(json.dumps(given))
    shutil.copy(FIXTURES / f"tiny_random_{family}" / "model.safetensors", folder)
    return folder


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemmas_norms_lose_the_1_that_llama_cpp_adds_to_them(tmp_path, family, monkeypatch):
    path = write(tmp_path / "model.gguf", family)
    (*got, params), *_ = import_gguf(path)
    *wanted, want = import_huggingface(gemma(tmp_path / "folder", family))
    assert got == wanted
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-7), params, want)
    name = family.removesuffix("_text")
    layers = got[0].num_layers
    monkeypatch.setitem(ARCHITECTURES, name, dataclasses.replace(ARCHITECTURES[name], gemma_27b=layers))
    assert import_gguf(path)[0][0] == dataclasses.replace(got[0], attention_divisor=16 / 4)


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


def sentencepiece_keys(content: bytes, **more) -> dict:
    """The keys that llama.cpp's converter makes of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    pieces = list(proto.pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [float(piece.score) for piece in pieces],
        "tokenizer.ggml.token_type": [int(piece.type) for piece in pieces],
        "tokenizer.ggml.bos_token_id": proto.trainer_spec.bos_id,
        "tokenizer.ggml.eos_token_id": proto.trainer_spec.eos_id,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def same_ids(made, original) -> None:
    rng = random.Random(0)
    texts = [*AWKWARD, "", TEXT[:3000]]
    texts += ["".join(rng.choices(AWKWARD, k=rng.randint(2, 12))) for _ in range(200)]
    texts += ["".join(chr(rng.randrange(0x20, 0xD800)) for _ in range(20)) for _ in range(200)]
    assert made.encode_batch(texts) == original.encode_batch(texts)
    assert (made.specials, made.bos_id, made.eos_id) == (original.specials, original.bos_id, original.eos_id)


@pytest.mark.parametrize("space", [True, False])
def test_a_sentencepiece_tokenizer_from_keys_has_the_ids_of_its_model(space):
    model = sentencepiece_model(add_dummy_prefix=space, user_defined_symbols=["<turn>"])
    made = read_tokenizer(sentencepiece_keys(model, add_space_prefix=space), "model.gguf")
    same_ids(made, SentencePieceTokenizer(model))
    assert made.begins and made.prompt_ids("a")[0] == made.bos_id and made.adds_space == space


def test_mistrals_tokenizer_from_keys_has_the_ids_of_its_model():
    path = Path(os.environ.get("GPTJAX_SHARED_DATA", "")) / "tokenizers" / "mistral_v1.model"
    if not path.is_file():
        pytest.skip("GPTJAX_SHARED_DATA names no folder with tokenizers/mistral_v1.model")
    model = path.read_bytes()
    same_ids(read_tokenizer(sentencepiece_keys(model), "mistral.gguf"), SentencePieceTokenizer(model))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "t5"}, "tokenizer t5 is not known"),
        ({"scores": [0.0]}, "400 tokens of 1 scores"),
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"token_type": [99] * 400}, "no SentencePiece model|not a SentencePiece model"),
        ({"tokens": ["a"] * 400}, "no SentencePiece model|not a SentencePiece model"),
        ({"eos_token_id": 400}, "eos_token_id=400; wanted one of 400 tokens"),
    ],
)
def test_keys_that_make_no_tokenizer_are_one_line(changes, said):
    with pytest.raises(InputError, match=said) as error:
        read_tokenizer(sentencepiece_keys(sentencepiece_model(), **changes), "model.gguf")
    assert "\n" not in str(error.value)


CHAT = {"tokens": [*pieces()["tokens"][:509], "<|im_start|>", "<|im_end|>", "<|endoftext|>"], "eos_token_id": 510}
JINJA = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def asked(monkeypatch) -> list:
    """The prompts and stop ids that a chat asks the model to go on from; it answers "Yes."."""
    asked = []

    def stream_text(decoder, params, prompts, texts, cfg, *, stop_ids, chunk, **more):
        asked.append((prompts, stop_ids))
        return iter([(row, "Yes.") for row in range(len(prompts))])

    monkeypatch.setattr(chat, "stream_text", stream_text)
    return asked


def test_a_chat_goes_through_the_runs_template_or_the_one_that_is_named(tmp_path, capsys, asked):
    keys = pieces(**CHAT) | {"eot_token_id": 510}

    def imported(name: str, jinja: str, *flags: str) -> str:
        path = write(tmp_path / f"{name}.gguf", "llama", tokenizer=keys, keys={"tokenizer.chat_template": jinja})
        assert main(["import", str(path), str(tmp_path / name), *flags]) == 0
        return capsys.readouterr().err

    assert "; chat template: chatml" in imported("run", JINJA)
    assert "; chat template: none that is known" in imported("unknown", JINJA + "?")
    imported("named", JINJA + "?", "--template", "chatml")
    tokenizer = load_tokenizer(tmp_path / "named" / "tokenizer")
    assert tokenizer.template == "chatml"
    said = [{"role": "system", "content": "a"}, {"role": "user", "content": "the cat"}]
    ids, _ = template_of(tokenizer).render(tokenizer, said, add_generation_prompt=True)
    flags = ["--chat", "--system", "a", "--prompt", "the cat"]
    for run, more in (("run", []), ("named", []), ("unknown", ["--template", "chatml"])):
        assert main(["generate", str(tmp_path / run), *flags, *more]) == 0
        assert capsys.readouterr().out == "Yes.\n" and asked.pop() == ([ids], (510, 511))
    unknown = str(tmp_path / "unknown")
    for command, says in (
        (["generate", unknown, *flags], "name one with --template, one of chatml"),
        (["generate", unknown, *flags, "--template", "gemma"], "needs the special token '<start_of_turn>'"),
        (["generate", unknown, *flags, "--template", "x"], "no chat template 'x'"),
        (["generate", unknown, *flags[1:]], "system='a': wanted none without --chat"),
        (["generate", unknown, "--chat"], "wanted a message with --chat"),
        (["import", f"{unknown}.gguf", str(tmp_path / "other"), "--template", "x"], "no chat template 'x'"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.strip()
        assert says in error and "\n" not in error, error


def test_where_a_key_is_missing_the_defaults_of_its_kind_hold(tmp_path):
    def made(**more):
        keys = {f"tokenizer.ggml.{key}": value for key, value in (pieces() | more).items()}
        return read_tokenizer(keys, "model.gguf")

    assert (
        not made(pre="qwen2").begins and made(pre="llama-bpe").begins and made(pre="qwen2", add_bos_token=True).begins
    )
    named = pieces()["tokens"][:509] + ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    ends = made(tokens=named, eos_token_id=510, eot_token_id=510)
    assert ends.stop_ids == (511,)
    with pytest.raises(InputError, match="splits text as 'bloom'"):
        made(pre="bloom")


def test_words_are_cut_as_the_key_says_and_written_back_so(tmp_path):
    tokens = pieces()["tokens"]
    cut = [*tokens[:507], "\u010a\u0120", "12", *tokens[509:]]
    ids = {}
    for pre in ("gpt-2", "smollm"):
        keys = pieces(pre=pre, tokens=cut, merges=["\u010a \u0120", "1 2"])
        made = read_tokenizer({f"tokenizer.ggml.{key}": value for key, value in keys.items()}, "model.gguf")
        ids[pre] = [cut[i] for i in made.encode("a\n 12")]
        write_tokenizer(made, tmp_path / pre)
        assert tokenizer_keys(made, tmp_path / pre, 512)["ggml.pre"] == pre
    assert ids == {"gpt-2": ["a", "\u010a", "\u0120", "12"], "smollm": ["a", "\u010a\u0120", "1", "2"]}


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_an_export_keeps_the_chat_template_and_all_that_ends_an_answer(tmp_path, form):
    keys = pieces(**CHAT) | {"eos_token_id": 511, "eot_token_id": 510}
    path = write(tmp_path / "model.gguf", "llama", tokenizer=keys, keys={"tokenizer.chat_template": JINJA})
    run, out, again = (str(tmp_path / name) for name in ("run", "out", "again"))
    assert main(["import", str(path), run]) == 0
    assert main(["export", run, out, "--format", form]) == 0
    if form == "huggingface":
        config, ends = (json.loads(Path(out, f"{name}.json").read_text()) for name in ("config", "generation_config"))
        assert ends == {"bos_token_id": 509, "eos_token_id": [511, 510]} and ends.items() <= config.items()
    else:
        read = gguf.GGUFReader(Path(out, "model.gguf")).fields
        named = {end: read[f"tokenizer.ggml.{end}_token_id"].contents() for end in ("bos", "eos", "eot")}
        assert named == {"bos": 509, "eos": 511, "eot": 510} and "tokenizer.chat_template" in read
    assert main(["import", out if form == "huggingface" else f"{out}/model.gguf", again]) == 0
    made = load_tokenizer(Path(again, "tokenizer"))
    assert (made.template, made.bos_id, made.eos_id, made.stop_ids) == ("chatml", 509, 511, (510,))


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

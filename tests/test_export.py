"""Laws of exports: what is written is what the run holds, whole or not at all, and opens with the same numbers."""

import functools
import json
import signal
import subprocess
import sys
import weakref
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from awkward_texts import AWKWARD, SHAKESPEARE
from safetensors.numpy import load_file, save_file
from test_interop import FAMILIES, FIXTURES

import gptjax
from gptjax.api import load, override, recipe
from gptjax.cli import main
from gptjax.config import TrainConfig
from gptjax.config.export import ExportConfig
from gptjax.config.section import InputError
from gptjax.interop.card import source_name
from gptjax.interop.export import export_model
from gptjax.interop.export_check import check_export
from gptjax.interop.gguf import import_gguf
from gptjax.interop.huggingface import import_huggingface
from gptjax.interop.weights_file import Tensor, check_weights, write_weights
from gptjax.model.decoder import init_params, make_decoder
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.events import read_events
from gptjax.runs.run import Run
from gptjax.stages import exports
from gptjax.tokenizer import BytesTokenizer, train_sentencepiece
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer
from gptjax.training.metrics_file import MetricsFile

SMALL = {"model.num_layers": 2, "model.width": 32, "model.num_heads": 2, "data.length": 16, "model.dtype": "float32",
         "model.unroll": 1, "tokenizer.vocab_size": 400, "tokenizer.kind": "sentencepiece"}  # fmt: skip


def noise(config: TrainConfig, seed: int = 0):
    """Parameters whose biases and scales are not 0 and 1, where one forgotten is unseen."""

    def one(path, leaf):
        name = path[-1].key
        made = np.random.default_rng(zlib.crc32(name.encode()) + seed).normal(size=leaf.shape)
        return ((name.startswith("norm_") and "bias" not in name) + 0.3 * made).astype(np.float32)

    shapes = jax.eval_shape(init_params(make_decoder(config)), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(one, shapes)


def make_run(folder: Path, name: str, settings: dict, step: int = 3, tokenizer=None, **items) -> Run:
    """A small run of a recipe with noise for weights and 400 pieces, as if it had been trained for `step` steps."""
    config = override(recipe(name), SMALL | settings | {"run_dir": str(folder)})
    run = Run.open(folder, config)
    (tokenizer or train_sentencepiece(iter([SHAKESPEARE[:40_000]]), 400)).save(run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    checkpoints.save(step, items or {"params": noise(config)}, {"rows": 0}, {})
    checkpoints.wait()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("run") / "small", "quickstart", {})


def assert_same_weights(got, want, vocab_size: int):
    """Bit for bit, but for the rows that pad the vocabulary."""
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    for (path, a), (other, b) in zip(got, want, strict=True):
        assert path == other
        rows = vocab_size if str(path[-1].key).endswith("_VD") else None
        np.testing.assert_array_equal(np.asarray(a)[:rows], np.asarray(b)[:rows], err_msg=str(path))


def byte_pairs() -> HuggingFaceTokenizer:
    from byte_pairs import END, TWO_FILES

    return HuggingFaceTokenizer(TWO_FILES, END, END)


# Round trips


@pytest.mark.parametrize("family", FAMILIES[:1])
def test_an_import_that_is_exported_has_its_tensors_bit_for_bit(tmp_path, family):
    assert main(["import", str(FIXTURES / family), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    got, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", FIXTURES / family))
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_stored_in_half_precision_come_back_bit_for_bit(tmp_path, dtype):
    kind, source = np.dtype(getattr(ml_dtypes, dtype, dtype)), tmp_path / "source"
    source.mkdir()
    tensors = {name: x.astype(kind) for name, x in load_file(FIXTURES / FAMILIES[1] / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    config = json.loads((FIXTURES / FAMILIES[1] / "config.json").read_text()) | {"dtype": dtype}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["import", str(source), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", dtype]) == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(got[name].tobytes() == x.tobytes() and got[name].dtype == kind for name, x in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


GGUF = {
    "quickstart": ("quickstart", {}, None),
    "gpt2": ("gpt2", {"tokenizer.kind": "huggingface", "tokenizer.vocab_size": 448}, byte_pairs),
    "bytes, queries normalised": (
        "quickstart", {"tokenizer.kind": "bytes", "tokenizer.vocab_size": 258, "model.qk_norm": True,
                       "model.queries_per_kv": 2, "model.tied": False}, BytesTokenizer,
    ),
    "biases of qwen2": ("quickstart", {"model.qkv_biases": True}, None),
}  # fmt: skip
RECIPES = {"quickstart": {}, "gpt2": {}, "llama_1b": {"model.queries_per_kv": 2, "model.head_dim": 0}}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_imported_of_an_export_is_what_the_run_holds(tmp_path, name):
    run = make_run(tmp_path / "run", name, RECIPES[name])
    said = gptjax.export(model := load(run.folder), tmp_path / "out")
    assert f"{sum(x.size for x in load_file(tmp_path / 'out' / 'model.safetensors').values()):,} parameters" in said
    cfg, *sizes, params = import_huggingface(tmp_path / "out")
    assert sizes == [400, 16]
    assert_same_weights(params, model.params, 400)


@pytest.mark.parametrize("name", GGUF)
def test_what_is_imported_of_a_gguf_file_is_what_the_run_holds(tmp_path, name):
    recipe, settings, make = GGUF[name]
    if make is not None:
        settings = settings | {"tokenizer.vocab_size": make().vocab_size}
    run = make_run(tmp_path / "run", recipe, settings, tokenizer=make and make())
    model = load(run.folder)
    for dtype in ("float32", "auto"):
        gptjax.export(model, tmp_path / dtype, format="gguf", dtype=dtype)
        (_, vocab_size, context, params), tokenizer, reason = import_gguf(tmp_path / dtype / "model.gguf")
        assert (vocab_size, context) == (model.tokenizer.vocab_size, 16)
        want = jax.tree_util.tree_map_with_path(functools.partial(stored, dtype), model.params)
        assert_same_weights(params, want, vocab_size)
        assert tokenizer is not None, reason
        ours = model.tokenizer
        assert [tokenizer.prompt_ids(text) for text in AWKWARD] == [ours.prompt_ids(text) for text in AWKWARD]
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begins) == (ours.bos_id, ours.eos_id, ours.begins)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.window": 4}, "a MistralForCausalLM can't be exported as GGUF here; wanted a model of llama or"),
        ({"model.window": 4, "model.qk_norm": True}, "a Qwen3ForCausalLM with model.window=4"),
        ({"model.biases": True}, "a LlamaForCausalLM with model.biases=True can't be exported as GGUF"),
        (
            {"model.rope_scaling": "linear", "model.rope_factor": 2.0},
            "with model.rope_scaling='linear' and model.rope_f",
        ),
    ],
)
def test_what_a_gguf_file_would_lose_is_refused_by_name(tmp_path, settings, said):
    config = override(recipe("quickstart"), SMALL | settings)
    with pytest.raises(InputError, match=said):
        check_export(config, ExportConfig(format="gguf"))
    assert check_export(config, ExportConfig())


def stored(dtype: str, path, x) -> np.ndarray:
    """A leaf as a GGUF file has it: in float16 matrices alone, but for the position table."""
    letters = str(path[-1].key).rsplit("_", 1)[-1].lstrip("N")
    matrix = len(letters) > 1 and letters not in ("TD", "NK", "HK", "GK")
    return np.asarray(x, np.float16 if matrix and dtype == "auto" else np.float32).astype(np.float32)


def test_averaged_weights_are_those_that_are_exported_and_a_step_may_be_named(tmp_path):
    settings = {"optim.ema": 0.9}
    config = override(recipe("quickstart"), SMALL | settings)
    run = make_run(tmp_path / "run", "quickstart", settings, params=noise(config), ema=noise(config, seed=1))
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    checkpoints.save(5, {"params": noise(config), "ema": noise(config, seed=2)}, {"rows": 0}, {})
    checkpoints.wait()
    for step, seed in ((3, 1), (0, 2)):
        out = tmp_path / f"out{step}"
        assert main(["export", str(run.folder), str(out), "--step", str(step)]) == 0
        assert_same_weights(import_huggingface(out)[3], noise(config, seed), 400)


def test_shards_hold_what_one_file_holds(tmp_path, run):
    model = load(run.folder)
    export_model(model, tmp_path / "one", ExportConfig())
    said = export_model(model, tmp_path / "many", ExportConfig(), most_bytes=30_000)
    one, index = tmp_path / "one", json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert (
        len(files) > 2 and f"in {len(files)} files" in said and files[-1].endswith(f"-of-{len(files):05}.safetensors")
    )
    together: dict = {}
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        size = sum(x.nbytes for x in tensors.values())
        assert size <= 30_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
        together |= tensors
    want = load_file(one / "model.safetensors")
    assert together.keys() == want.keys() and index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())
    assert all(together[name].tobytes() == want[name].tobytes() for name in want)
    assert_same_weights(import_huggingface(tmp_path / "many")[3], model.params, 400)


def test_tensors_are_made_one_at_a_time(tmp_path):
    alive = []

    def tensor(i: int) -> Tensor:
        def read():
            assert sum(x() is not None for x in alive) <= 1, "the one before is still held"
            made = np.full((64, 64), i, np.float32)
            alive.append(weakref.ref(made))
            return made

        return Tensor(f"t{i}", (64, 64), read)

    files = write_weights(tmp_path, tensors := [tensor(i) for i in range(8)], "float32")
    check_weights(files, tensors, "float32")
    assert {name: x[0, 0] for name, x in load_file(files[0]).items()} == {f"t{i}": i for i in range(8)}
    with pytest.raises(InputError, match="t0 was not written as it should be"):
        check_weights(files, [tensors[0]._replace(shape=(4096,)), *tensors[1:]], "float32")


# Refusals, and what is left behind


def test_what_can_not_be_exported_is_one_line_and_leaves_nothing(tmp_path, run, capsys):
    def refusal(*words) -> str:
        assert main(["export", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "full is there already; wanted a new folder" in refusal(run.folder, tmp_path / "full")
    assert "wanted a folder of this machine" in refusal(run.folder, "gs://bucket/out")
    assert "no checkpoint of step 7" in refusal(run.folder, tmp_path / "out", "--step", 7)
    assert "DIR is missing" in refusal(run.folder)
    block = make_run(tmp_path / "block", "quickstart", {"model.block": "mine:block"})
    assert "model.block='mine:block' is code" in refusal(block.folder, tmp_path / "out")
    capped = make_run(tmp_path / "capped", "quickstart", {"model.logit_softcap": 5.0, "model.parallel": True})
    assert "no architecture of transformers has" in refusal(capped.folder, tmp_path / "out")
    large = {"params": jax.tree.map(lambda x: 1e6 * x, noise(override(recipe("quickstart"), SMALL)))}
    large = make_run(tmp_path / "large", "quickstart", {}, **large)
    assert "too large for float16; add --dtype bfloat16" in refusal(large.folder, tmp_path / "o", "--dtype", "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block", "capped", "full", "large"]


KILLED = """
import os, sys
from gptjax.interop import weights_file
converted, count = weights_file.converted, []

def killed(*args):
    count.append(0)
    if len(count) == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    return converted(*args)

weights_file.converted = killed
from gptjax.cli import main
sys.exit(main(["export", *sys.argv[2:]]))
"""


def test_a_kill_leaves_no_folder_that_looks_whole_and_the_same_command_goes_on(tmp_path, run):
    words = [str(run.folder), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, "9", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    assert main(["export", *words]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# The card


def test_the_card_says_what_the_run_says_and_names_no_folder_of_the_machine(tmp_path):
    settings = {"data.source": str(tmp_path / "secret" / "corpus.txt"), "init": str(tmp_path / "secret" / "older")}
    run = make_run(tmp_path / "named", "quickstart", settings)
    metrics = MetricsFile(run.metrics_path)
    for step in (1, 2, 3, 4):
        metrics.write({"step": step, "loss": 5.0 - step, "tokens": 128 * step})
        metrics.write({"step": step, "eval_loss": 6.0 - step, "eval_bits_per_byte": 1.25 + step})
    metrics.close()
    export_model(load(run.folder), tmp_path / "out", ExportConfig())
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "license" not in front
    assert front["pipeline_tag"] == "text-generation" and "gptjax" in front["tags"]
    for said in ("# named", "trained on corpus.txt", "weights of older", "| steps | 3 of 1,600 |", "| tokens | 384 |",
                 "training loss (nats a token) | 2.0000", "eval_bits_per_byte, step 3 | 4.2500", "LlamaForCausalLM",
                 "whoever publishes this model names its licence", "adamw, learning rate 0.002", "jax "):  # fmt: skip
        assert said in card, said
    assert str(tmp_path) not in card and "secret" not in card


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("builtin:shakespeare", "builtin:shakespeare"),
        ("hf:org/name:train", "hf:org/name:train"),
        ("hf:/home/me/set:train", "hf:set:train"),
        ("tfds:lm1b", "tfds:lm1b"),
        ("/home/me/corpora/mine/", "mine"),
        ("gs://bucket/corpora/mine", "mine"),
        ("package.module:texts", "package.module:texts"),
    ],
)
def test_a_source_is_named_without_its_folders(source, name):
    assert source_name(source) == name


# During training


def test_a_failed_export_is_an_event_and_a_line_and_a_full_one_is_not_made_again(tmp_path, run, monkeypatch, capsys):
    made = exports.Exports(run, every=2, last=5)
    monkeypatch.setattr(exports.sys, "executable", "/bin/false")
    with made:
        for step in (0, 1, 2, 5):
            made.begin(step)
    assert [(e["step"], e["kind"]) for e in read_events(run.events_path)] == [
        (2, "export_failed"),
        (5, "export_failed"),
    ]
    assert "step 2 could not be exported (code 1); the run goes on" in capsys.readouterr().err
    assert not made.steps and not list(run.exports.iterdir())


@pytest.mark.slow
def test_a_run_exports_its_checkpoints_while_it_trains(tmp_path):
    run, flags = tmp_path / "run", []
    settings = SMALL | {"steps": 5, "checkpoint.every": 2, "checkpoint.export_every": 2, "checkpoint.keep_newest": 1,
                        "data.batch_size": 8, "evaluate.max_rows": 8}  # fmt: skip
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    assert main(["pretrain", "quickstart", "--run-dir", str(run), *flags]) == 0
    folders = {p.name for p in (run / "exports").iterdir()}
    assert folders == {"step_2", "step_4", "step_5"}
    assert [e["step"] for e in read_events(run / "events.jsonl") if e["kind"] == "exported"] == [2, 4, 5]
    assert_same_weights(import_huggingface(run / "exports" / "step_5")[3], load(run).params, 400)


def test_a_run_that_could_never_be_exported_is_refused_before_it_begins(tmp_path, capsys):
    words = ["pretrain", "quickstart", "--run-dir", str(tmp_path / "run"), "--checkpoint.export-every", "500"]
    assert main([*words, "--model.parallel"]) == 2
    assert "no architecture of transformers has" in capsys.readouterr().err
    assert main([*words[:-1], "300"]) == 2
    assert "checkpoint.export_every=300: wanted a multiple of checkpoint.every=500" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Runs of the stages that begin from a run: a tiny base, what a run says of itself, and one that was stopped."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np

from gptjax.config import DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import leaves
from gptjax.model.decoder import init_params, make_decoder
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.load import load_model
from gptjax.runs.run import Run, load_config
from gptjax.tokenizer import BytesTokenizer, set_template

MODEL = ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32")
TOKENIZER = TokenizerConfig(kind="bytes", vocab_size=258)
CLOCK = ("seconds", "tokens_per_second", "input_seconds", "peak_memory_bytes", "mfu_6n", "mfu_causal", "mfu_palm")


def make_run(folder: Path, seed: int = 0, model: ModelConfig = MODEL, length: int = 64, template: str = "") -> Path:
    """A run of bytes with the first weights of a seed as its step 0, as if it had been imported."""
    config = TrainConfig(run_dir=str(folder), model=model, tokenizer=TOKENIZER, data=DataConfig(length=length))
    run = Run.open(folder, config)
    tokenizer = BytesTokenizer()
    set_template(tokenizer, template)
    tokenizer.save(run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    params = jax.jit(init_params(make_decoder(config)))(jax.random.key(seed))
    checkpoints.save(0, {"params": params}, {"rows": 0}, dict(leaves(config)))
    checkpoints.wait()
    run.close()
    return folder


def on_all_devices(words: list) -> list[str]:
    """The words of a command, with a mesh of all devices unless they name one."""
    named = any("mesh" in str(word) for word in words)
    return [*map(str, words), *([] if named else ["--mesh.data", str(jax.device_count())])]


def lines(run: Path) -> list[dict]:
    """Every line of metrics.jsonl, without what a clock or the machine says."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in CLOCK} for line in found]


def stopped(run: Path, at: Path, step: int) -> Path:
    """A copy of a run, with one checkpoint behind that of the step, as it was when it ended after the step."""
    moved = shutil.copytree(run, at)
    *_, last = sorted((moved / "checkpoints").glob("[0-9]*"))
    assert int(last.name) > step
    shutil.rmtree(last)
    (moved / "scores.json").unlink(missing_ok=True)
    kept = (moved / "metrics.jsonl").read_text().splitlines(keepends=True)
    (moved / "metrics.jsonl").write_text("".join(line for line in kept if json.loads(line)["step"] <= step))
    return moved


def assert_same(run: Path, other: Path) -> None:
    """Every number, weight and state of the data of two runs is the same, bit for bit."""
    assert lines(run) == lines(other)
    *_, newest = sorted((run / "checkpoints").glob("[0-9]*"))
    for name in (f"checkpoints/{newest.name}/digests/data.json", "scores.json"):
        assert (run / name).exists() == (other / name).exists()
        assert not (run / name).exists() or (run / name).read_bytes() == (other / name).read_bytes()
    heads = ("score_D",) if load_config(run).stage == "reward" else ()
    a, b = (load_model(folder, MeshConfig(), heads=heads).params for folder in (run, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)

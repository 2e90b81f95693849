"""Wrong input of a run is told before jax is imported, in one line that says what to do, and at once."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import environment

from gptjax.cli import main
from gptjax.config import TrainConfig
from gptjax.runs.run import Run

REFUSED = """
import contextlib, io, json, os, sys
from gptjax.cli import main
told = []
for words, variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(words)
    told.append([code, errors.getvalue(), "jax" in sys.modules])
print(json.dumps(told))
"""
CPU = {"JAX_PLATFORMS": "cpu"}
PLUGINS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}


def test_what_needs_no_jax_is_refused_without_it_and_leaves_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    run = Run.open(tmp_path / "trained", TrainConfig(run_dir=str(tmp_path / "trained")))
    (run.checkpoints / "00000004").mkdir(parents=True)
    (run.checkpoints / "00000004" / "manifest.json").write_text("{}")
    quickstart = ["pretrain", "quickstart", "--run-dir", str(tmp_path / "run")]
    wrong = {
        ("--data.source", "/nope/my texts"): "source '/nope/my texts' does not exist; wanted a file, a folder",
        ("--data.source", str(tmp_path / "empty")): "has no text in it; wanted files",
        ("--data.source", "builtin:milton"): "builtin:shakespeare",
        ("--data.validation", "more=/nope"): "source '/nope' does not exist",
        ("--tokenizer.path", "/nope/t.model"): "tokenizer file /nope/t.model cannot be read",
        ("--tokenizer.kind", "huggingface", "--tokenizer.path", "gpt2"): "hf download gpt2 --local-dir gpt2",
        ("--tokenizer.kind", "tiktoken"): "none is trained of tokenizer.kind='tiktoken'; add --tokenizer.path",
        ("--mesh.tensor", "3"): "mesh.tensor=3, mesh.context=1 does not cover the 1 device(s) here",
        ("--init", "runs/nope"): "runs/nope: no folder; wanted the folder of a run",
        ("--evaluate.tasks", "/nope.jsonl:shots=1"): "/nope.jsonl can't be read: No such file or directory",
        ("--run-dir", str(tmp_path / "file" / "run")): "a run can't be written there",
    }
    asked = [([*quickstart, *more], CPU) for more in wrong]
    asked.append((["pretrain", str(run.folder), "--model.num-layers", "3"], CPU))
    asked.append((["pretrain", str(run.folder)], CPU))  # this process has it
    asked.append((["pretrain", str(tmp_path / "nope")], CPU))
    asked.append((["sft", "chat", "--init", str(run.folder)], CPU))
    asked += [(quickstart, {"JAX_PLATFORMS": platform}) for platform in PLUGINS]
    command = [sys.executable, "-c", REFUSED, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [
        *wrong.values(),
        "model.num_layers was 12, got 3",
        "is being trained by process",
        "no such recipe; wanted a Python file, a run, or one of",
        "source 'chats.jsonl' does not exist",
    ]
    said += [f"pip install 'gptjax[{extra}" for extra in PLUGINS.values()]
    for (words, _), (code, errors, jax), part in zip(asked, json.loads(done.stdout), said, strict=True):
        assert code == 2 and not jax, (words, errors)
        assert errors.startswith("gptjax: ") and errors.count("\n") == 1 and part in errors, (words, errors)
    assert not (tmp_path / "run").exists()


def test_processes_of_a_job_leave_it_to_the_first(monkeypatch, tmp_path, capsys):
    from gptjax.stages.early import check_early
    from gptjax.stages.summary import print_summary

    wrong = TrainConfig(run_dir=str(tmp_path), init="nowhere")
    monkeypatch.setenv("SLURM_PROCID", "1")
    check_early(wrong)
    print_summary(wrong, {})
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_PROCID", "0")
    print_summary(wrong, {})
    assert "parameters" in capsys.readouterr().err


HANGING = """
import threading, time
from gptjax import __main__
from gptjax.runtime.process import BACKGROUND
def main():
    threading.Thread(target=time.sleep, args=(60,), name=BACKGROUND + "_0").start()
    print("told")
    return {code}
__main__.main = main
__main__.console()
"""


def test_a_verb_that_failed_does_not_wait_for_its_compile():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGING.format(code=2)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "told\n") and time.monotonic() - began < 40


ELSEWHERE = {
    "--lr 1": "--optim.learning-rate", "--max-iters 1": "--steps", "--max_steps 1": "--steps", "--epochs 1": "--steps",
    "--batch_size 1": "--data.batch-size", "--block-size 1": "--data.length", "--grad-clip 1": "--optim.clip-norm",
    "--n_layer 1": "--model.num-layers", "--bf16": "--model.dtype", "--out_dir x": "--run-dir",
    "--warmup-iters 1": "--optim.warmup-steps", "--dataset x": "--data.source", "--dropout 1": "--model.dropout",
}  # fmt: skip


@pytest.mark.parametrize("words", ELSEWHERE)
def test_settings_of_other_programs_are_named_as_they_are_called_here(words, capsys):
    assert main(["pretrain", "quickstart", *words.split()]) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {ELSEWHERE[words]}?\n")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("rlhf x", "there is no verb 'rlhf'; see gptjax --help"),
        ("resume x", "there is no verb 'resume'; did you mean 'pretrain RUN'?"),
        ("finetune x", "there is no verb 'finetune'; did you mean 'pretrain RECIPE --init RUN'?"),
        ("train x", "there is no verb 'train'; did you mean 'pretrain'?"),
        ("pretrain quickstart --resume", "the same command, run again, goes on, and so does gptjax pretrain RUN"),
        ("pretrain gpt-2", "no such recipe, the nearest is gpt2; wanted a Python file, a run, or one of "),
        ("import gpt2 runs/x", "gpt2 is not here; wanted a Hugging Face folder, a .gguf file, or a name of the hub"),
    ],
)
def test_words_of_other_programs_are_answered_with_ours(words, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1 and not list(Path(tmp_path).iterdir())

"""Mistakes of a first day that no other file here holds, each answered in a line that says what to do.

What becomes of a run whose parts were deleted, and of two commands that write one folder.
"""

import fcntl
import shutil
import threading
from pathlib import Path

import pytest
from commands import refused

from gptjax.cli import main
from gptjax.data.sources import LOCK_FILE
from gptjax.training.metrics_file import MetricsFile

SMALL = """--model.num-layers 1 --model.width 32 --model.num-heads 2 --data.length 32 --data.batch-size 8 --steps 3
--evaluate.max-rows 4 --optim.warmup-steps 1 --no-sample --sinks
--tokenizer.kind sentencepiece --tokenizer.vocab-size 300""".split()
pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compile_cache) -> Path:
    """A run of three steps, on a text beside it that it has a tokenizer of its own for."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "a.txt").write_text("It was the best of times, it was the worst of times.\n" * 60)
    words = ["--data.source", str(folder / "a.txt"), "--run-dir", str(folder / "run")]
    assert main(["pretrain", "shakespeare_char", *SMALL, *words]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def continued(run: Path, capsys, *more: str) -> str:
    """What a run says that goes on by its folder."""
    capsys.readouterr()
    assert main(["pretrain", str(run), *more]) == 0
    return capsys.readouterr().err


def test_deleted_metrics_and_a_deleted_tokenizer_are_told_and_the_run_goes_on(run, capsys):
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "tokenizer")
    assert str(run / "tokenizer") in (line := refused(capsys, "generate", run)) and "; " in line, line
    said = continued(run, capsys, "--steps", "4")
    assert f"{run / 'metrics.jsonl'} is not there: its curves begin after step 3\n" in said
    assert {line["step"] for line in MetricsFile(run / "metrics.jsonl").read()} == {4}
    assert (run / "tokenizer" / "tokenizer.model").is_file()


def test_deleted_checkpoints_are_told_by_what_reads_them_and_by_what_begins_again(run, capsys):
    shutil.rmtree(run / "checkpoints")
    for verb in ("eval", "generate"):
        assert "no checkpoint; it was not saved yet, or its checkpoints were removed; train it (again)" in refused(
            capsys, verb, run
        )
    said = continued(run, capsys)
    assert "no checkpoint of this run is there: it had come to step 3, and begins again\n" in said
    assert [line["step"] for line in MetricsFile(run / "metrics.jsonl").read() if "loss" in line] == [1, 2, 3]


def test_a_deleted_config_is_told_with_the_way_out(run, capsys):
    (run / "config.json").unlink()
    for verb in ("pretrain", "generate", "eval"):
        line = refused(capsys, verb, run)
        assert "holds checkpoints but no config.json, so their settings are unknown; restore that file" in line


def test_a_tokenizer_of_another_size_is_told_with_the_flag_that_fits(trained, tmp_path, capsys):
    given = ["--tokenizer.path", trained / "tokenizer" / "tokenizer.model", "--tokenizer.vocab-size", "512"]
    line = refused(capsys, "prepare", "--source", trained.parent / "a.txt", "--out", tmp_path / "out", *given)
    assert line.endswith("has 300 tokens; add --tokenizer.vocab-size 300\n")


def test_a_second_prepare_of_one_folder_waits_for_the_first_and_says_so(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptjax.runtime.status.SILENT_SECONDS", 0.05)
    (tmp_path / "out").mkdir()
    held = (tmp_path / "out" / LOCK_FILE).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.5, held.close).start()
    words = ["--source", str(trained.parent / "a.txt"), "--out", str(tmp_path / "out"), *SMALL[-4:]]
    assert main(["prepare", *words]) == 0
    assert f"waiting for another process, which prepares {tmp_path / 'out'} ...\n" in capsys.readouterr().err

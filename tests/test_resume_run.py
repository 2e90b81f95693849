"""A run goes on by its folder: without its recipe, with new settings where they may change, each told and kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptjax.cli import main
from gptjax.data.packing import batch_hash
from gptjax.data.pipeline import open_pipeline
from gptjax.runs.events import read_events, rows_of_step, write_event
from gptjax.runs.run import Run, load_config, read_config

SMALL = """--model.num-layers 1 --model.width 16 --model.num-heads 2 --model.dtype float32 --data.length 16
--data.batch-size 8 --evaluate.max-rows 8 --optim.warmup-steps 1 --no-sample --tokenizer.kind bytes
--tokenizer.vocab-size 258 --sinks""".split()
CURVE = ("step", "updates", "loss", "tokens", "grad_norm", "learning_rate", "eval_loss")
pytestmark = pytest.mark.usefixtures("compile_cache")


def pretrain(*words: object, code: int = 0) -> None:
    assert main(["pretrain", *map(str, words)]) == code


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple]:
    return [tuple(line.get(name) for name in CURVE) for line in lines(run)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe on a text of its own."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "a.txt").write_text("It was the best of times, it was the worst of times.\n" * 100)
    (folder / "mine.py").write_text(
        "from gptjax.config import DataConfig, TrainConfig\n\n\ndef pretrain():\n"
        f"    return TrainConfig(steps=4, data=DataConfig(source={str(folder / 'a.txt')!r}))\n"
    )
    return folder / "mine.py"


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory, compile_cache) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    pretrain(recipe, *SMALL, "--run-dir", folder)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, which lies elsewhere."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_goes_on_by_its_folder_as_by_the_whole_command_and_runs_no_recipe(run, recipe, tmp_path, monkeypatch):
    again = shutil.copytree(run, tmp_path / "again")
    pretrain(recipe, *SMALL, "--run-dir", again, "--steps", 8)
    monkeypatch.setattr("gptjax.runs.resume.load_recipe", lambda name: pytest.fail("a recipe was run"))
    pretrain(run, "--steps", 8)
    assert curve(run) == curve(again) and len(curve(run)) == 10
    settings = read_config(run)["settings"]
    assert settings["steps"] == {"value": 8, "from": "command line"}
    assert settings["model.width"] == {"value": 16, "from": "command line"}, "as it was"
    assert settings["data.source"]["from"] == "recipe"
    assert read_config(run)["recipe"]["path"] == str(recipe)


def test_settings_that_may_change_are_told_kept_as_an_event_and_the_curve_goes_on(run, capsys):
    free = ["--optim.learning-rate", "1e-3", "--optim.schedule", "linear", "--optim.weight-decay", "0.2",
            "--optim.clip-norm", "0", "--data.batch-size", "16", "--optim.accumulate", "2"]  # fmt: skip
    pretrain(run, "--steps", 7, *free)
    told = capsys.readouterr().err
    wanted = (
        "steps was 4, now 7: the schedule changes with it",
        "data.batch_size was 8, now 16: the data go on with the next row; the schedule counts steps, as before",
        "optim.learning_rate was 0.0006, now 0.001",
        "optim.schedule was 'cosine', now 'linear'",
        "optim.weight_decay was 0.1, now 0.2",
        "optim.clip_norm was 1.0, now 0.0",
        "optim.accumulate was 1, now 2",
    )
    for line in wanted:
        assert line in told.splitlines()
    kinds = [event["kind"] for event in read_events(run / "events.jsonl")]
    assert kinds == ["started", "saved", "finished", "resumed", "saved", "finished"]
    first, second = (event for event in read_events(run / "events.jsonl") if "rows" in event)
    assert {name: first[name] for name in ("step", "kind", "rows", "batch_size", "changes")} == {
        "step": 0, "kind": "started", "rows": 0, "batch_size": 8, "changes": [],
    }  # fmt: skip
    assert {name: second[name] for name in ("step", "kind", "rows", "batch_size")} == {
        "step": 4, "kind": "resumed", "rows": 32, "batch_size": 16,
    }  # fmt: skip
    assert sorted(second["changes"]) == sorted(wanted) and second["time"]
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 8))
    assert [line["tokens"] // 16 for line in steps] == [8, 16, 24, 32, 48, 64, 80]
    capsys.readouterr()
    pretrain(run)
    assert "was" not in capsys.readouterr().err.replace("wasn't", ""), "they are the run's own from then on"


def test_a_new_batch_size_neither_repeats_nor_skips_a_row_and_data_show_knows_it(run, capsys):
    pretrain(run, "--steps", 6, "--data.batch-size", 24, "--mesh.data", 8)
    config = load_config(run)
    data = open_pipeline(config, Run.at(run).data)
    whole = np.concatenate([data.batch(first)["inputs_BL"] for first in range(0, 72, 24)])
    for step, (first, size) in {1: (0, 8), 4: (24, 8), 5: (32, 24), 6: (56, 24)}.items():
        assert rows_of_step(run / "events.jsonl", step, 24) == (first, size)
        capsys.readouterr()
        assert main(["data", "show", str(run), "--step", str(step)]) == 0
        shown = capsys.readouterr().out
        assert f"batch of {size} rows of 16" in shown
        if size == 24:
            assert batch_hash(data.batch(first)) in shown
    assert len(whole) == 72


def test_an_event_that_a_later_start_from_an_older_step_replaced_counts_no_more(tmp_path):
    path = tmp_path / "events.jsonl"
    for step, rows, size in ((0, 0, 8), (600, 4800, 16), (500, 4000, 4)):
        write_event(path, step, "resumed", rows=rows, batch_size=size)
    assert rows_of_step(path, 500, 1) == (499 * 8, 8)
    assert rows_of_step(path, 801, 1) == (4000 + 300 * 4, 4)
    assert rows_of_step(tmp_path / "none", 3, 5) == (10, 5)


def refusal(capsys, *words: object) -> str:
    capsys.readouterr()
    pretrain(*words, code=2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("gptjax: "), err
    return err.strip()


def test_what_may_not_change_is_refused_at_once_and_names_the_way_to_another_run(run, recipe, capsys):
    line = refusal(capsys, run, "--model.width", 32)
    assert "model.width was 16, got 32" in line and line.endswith(
        f"--run-dir FOLDER, from these weights with --init {run}"
    )
    assert "goes on in its own folder" in refusal(capsys, run, "--run-dir", "elsewhere")
    assert "there is no setting --size" in refusal(capsys, run, "--size", 4)
    (run / "config.json").unlink()
    assert "holds checkpoints but no config.json" in refusal(capsys, run)
    assert "holds checkpoints but no config.json" in refusal(capsys, recipe, *SMALL, "--run-dir", run)


def test_code_that_a_run_names_is_named_again_on_the_command_line(run, capsys):
    document = json.loads((run / "config.json").read_text())
    for setting, value in (("loss", "evil:loss"), ("data.source", "evil:texts"), ("model.block", "evil:block")):
        changed = json.loads(json.dumps(document))
        changed["settings"][setting]["value"] = value
        (run / "config.json").write_text(json.dumps(changed))
        flag = "--" + setting
        assert refusal(capsys, run).endswith(f"name it again: {flag} {value}")
    # Named again it is a setting like any other: imported, or refused where it can't be.
    (run / "config.json").write_text(json.dumps(document))
    assert "loss was '', got 'nowhere:loss'" in refusal(capsys, run, "--loss", "nowhere:loss")

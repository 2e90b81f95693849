"""A run folder says what was trained, and refuses to become another run."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.config import (
    CheckpointConfig,
    DataConfig,
    GenerateConfig,
    MeshConfig,
    ModelConfig,
    TokenizerConfig,
    TrainConfig,
)
from gptjax.config.section import InputError, leaves
from gptjax.runs import run as run_module
from gptjax.runs.run import Provenance, Run, environment, load_config, read_config
from gptjax.storage import write_json

CFG = TrainConfig(
    steps=100, model=ModelConfig(num_layers=2, width=64, num_heads=4), generate=GenerateConfig(prompt=("a\n", "b"))
)
RECIPE = {"path": "configs/quickstart.py", "sha256": "ab" * 32}
ORIGINS = {"steps": "command line", "model.width": "recipe"}


def open_run(folder, config=CFG) -> Run:
    return Run.open(folder, config, Provenance(**RECIPE, origins=ORIGINS))


def commit_step(run: Run, step: int = 10):
    """As much of a checkpoint as a run looks at."""
    (run.checkpoints / f"{step:08d}").mkdir(parents=True)
    (run.checkpoints / f"{step:08d}" / "manifest.json").write_text("{}")


def test_a_run_knows_its_settings_and_where_each_came_from(tmp_path):
    run = open_run(tmp_path / "a" / "b")
    assert load_config(run.folder) == CFG
    document = json.loads(run.config_path.read_text())
    assert list(document) == ["schema", "stage", "recipe", "settings"]
    assert (document["schema"], document["stage"], document["recipe"]) == (1, "pretrain", RECIPE)
    settings = document["settings"]
    assert list(settings) == [name for name, _ in leaves(CFG)]
    assert settings["steps"] == {"value": 100, "from": "command line"}
    assert settings["model.width"] == {"value": 64, "from": "recipe"}
    assert settings["seed"] == {"value": 0, "from": "default"}
    assert read_config(run.folder) == document


def test_what_a_killed_start_left_in_the_folder_is_removed_by_the_next(tmp_path):
    for name in (".probe-ab", ".probe-12", "notes"):
        (tmp_path / name).write_text("")
    open_run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "config.json", "environment.json", "notes"}


def test_a_run_knows_its_machine(tmp_path):
    run = open_run(tmp_path)
    known = json.loads(run.environment_path.read_text())
    assert known["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert known["command"] == sys.argv and known["processes"] == 1
    assert all(
        known["versions"][p][0].isdigit() for p in ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    )


def test_the_commit_is_that_of_this_package_and_of_no_other_checkout(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    package = tmp_path / "gptjax"
    (package / "runs").mkdir(parents=True)
    (package / "runs" / "run.py").write_text("1")
    monkeypatch.setattr(run_module, "__file__", str(package / "runs" / "run.py"))
    assert environment()["commit"] == ""
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert environment()["commit"] == "", "the file is not part of that checkout"
    git("add", "gptjax/runs/run.py")
    git("commit", "-q", "-m", "y")
    assert len(environment()["commit"]) == 40
    (package / "runs" / "run.py").write_text("2")
    assert environment()["commit"].endswith("+changes")


def test_settings_may_change_until_something_was_trained(tmp_path):
    other = dataclasses.replace(CFG, seed=1)
    open_run(tmp_path)
    assert open_run(tmp_path, other).changes == ()
    assert load_config(tmp_path) == other


def test_frozen_settings_are_refused_by_name_with_both_values(tmp_path):
    run = open_run(tmp_path)
    commit_step(run)
    before = run.config_path.read_bytes()
    other = dataclasses.replace(CFG, seed=1, model=ModelConfig(num_layers=2, width=128, num_heads=4))
    with pytest.raises(InputError, match="seed was 0, got 1; model.width was 64, got 128; .*--run-dir.*--init") as e:
        open_run(tmp_path, other)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
    assert run.config_path.read_bytes() == before


def test_free_and_changeable_settings_may_change_and_are_told(tmp_path):
    commit_step(open_run(tmp_path))
    other = dataclasses.replace(
        CFG, steps=200, mesh=MeshConfig(fsdp=8), checkpoint=CheckpointConfig(every=7), run_dir="z",
        data=dataclasses.replace(CFG.data, batch_size=32), optim=dataclasses.replace(CFG.optim, learning_rate=1e-3),
    )  # fmt: skip
    run = open_run(tmp_path, other)
    assert run.changes == (
        "steps was 100, now 200: the schedule changes with it",
        "data.batch_size was 16, now 32: the data go on with the next row; the schedule counts steps, as before",
        "optim.learning_rate was 0.0006, now 0.001",
        "mesh.fsdp was 1, now 8",
        "checkpoint.every was 500, now 7",
    )
    assert load_config(tmp_path) == CFG, "the data is not compared yet"
    run.write_settings(other, Provenance())
    assert load_config(tmp_path) == other
    assert open_run(tmp_path, other).changes == ()


def test_settings_that_are_compared_by_content_may_be_spelt_otherwise(tmp_path):
    commit_step(open_run(tmp_path))
    moved = dataclasses.replace(
        CFG, data=DataConfig(source="moved/text"), tokenizer=TokenizerConfig(path="moved/tokenizer")
    )
    changes = open_run(tmp_path, moved).changes
    assert changes == (
        "tokenizer.path was '', now 'moved/tokenizer'",
        "data.source was 'builtin:shakespeare', now 'moved/text'",
    )


def test_a_run_is_not_made_shorter_than_it_is(tmp_path):
    commit_step(open_run(tmp_path), step=60)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match="steps=50: .* is at step 60 already; wanted --steps 60 or more, .*--run-dir"):
        open_run(tmp_path, dataclasses.replace(CFG, steps=50))
    assert (tmp_path / "config.json").read_bytes() == before
    shorter = open_run(tmp_path, dataclasses.replace(CFG, steps=60))
    assert shorter.changes == ("steps was 100, now 60: the schedule changes with it",)


def test_checkpoints_without_settings_are_refused(tmp_path):
    run = open_run(tmp_path)
    commit_step(run)
    run.config_path.unlink()
    with pytest.raises(InputError, match="checkpoints but no config.json"):
        open_run(tmp_path)


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path, said in [
        (tmp_path, "without config.json"),
        (tmp_path / "no", "no folder"),
        (tmp_path / "file", "no folder"),
    ]:
        with pytest.raises(InputError, match=said) as e:
            Run.existing(path)
        assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)
        with pytest.raises(InputError, match=said):
            load_config(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: '{\n "schema": 1,\n oops}', r"config\.json:3: not valid JSON"),
        (lambda d: "", r"config\.json:1: not valid JSON"),
        (lambda d: b'{"schema": \xff}', "UTF-8 .byte 11"),
        (lambda d: "[" * 100_000, "not valid JSON"),
        (lambda d: "[1]", "no schema number"),
        (lambda d: d.update(schema=2), "schema 2; this gptjax reads schema 1"),
        (lambda d: d.update(schema=True), "schema True"),
        (lambda d: d.update(stage="distil"), "stage 'distil'; wanted one of pretrain"),
        (lambda d: d.update(extra=1), "'extra' is missing or unknown"),
        (lambda d: d.pop("stage") and None, "'stage' is missing or unknown"),
        (lambda d: d.update(settings=[]), "settings is no table"),
        (
            lambda d: d["settings"].update({"model.widht": {"value": 1, "from": "x"}}),
            r"config.json: there is no setting model.widht; did you mean model.width\?",
        ),
        (lambda d: d["settings"].pop("model.width"), "'model.width' is missing"),
        (lambda d: d["settings"].update({"model.width": 64}), "'model.width' is not of the form"),
        (lambda d: d["settings"]["model.width"].update(value="64"), "model.width='64': wanted"),
        (lambda d: d["settings"]["model.width"].update(value=65), "model.width=65: wanted a multiple"),
        (lambda d: d["settings"]["optim.learning_rate"].update(value=float("nan")), "optim.learning_rate=nan"),
    ],
)
def test_a_damaged_config_is_refused_and_says_why(tmp_path, change, said):
    """`change` edits the settings in place, or returns the file's new text."""
    run = open_run(tmp_path)
    document = json.loads(run.config_path.read_text())
    result = change(document)
    text = result if isinstance(result, str | bytes) else json.dumps(document)
    run.config_path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as e:
        load_config(tmp_path)
    assert "\n" not in str(e.value)


def test_reading_a_run_never_runs_its_recipe(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    Run.open(tmp_path / "run", CFG, Provenance(str(recipe)))
    load_config(tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": [1, 2, {3}]})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_place_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in [tmp_path / "file", tmp_path / "file" / "run", tmp_path / "loop" / "run", Path("/proc/self")]:
        with pytest.raises(InputError, match="can't be written there") as e:
            open_run(place)
        assert "\n" not in str(e.value)


HOLD = """
import sys, time
from gptjax.config import TrainConfig
from gptjax.runs.run import Run
for _ in range(2):  # a process does not lock itself out, nor lose the run by opening it twice
    Run.open(sys.argv[1], TrainConfig())
print("holding", flush=True)
time.sleep(60)
"""


def test_a_run_is_trained_by_one_process_at_a_time_and_a_dead_one_holds_nothing(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "holding\n"
        with pytest.raises(InputError, match=f"is being trained by process {other.pid} on .*, started ") as e:
            open_run(tmp_path)
        assert "\n" not in str(e.value)
        load_config(tmp_path)  # reading is no training
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    open_run(tmp_path)

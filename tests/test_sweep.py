"""A sweep: the same command always ends with the same table, and a branch is the run that it stands for."""

import csv
import dataclasses
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
from commands import GPTJAX, curve, environment, finish, kill_group

from gptjax.cli import main
from gptjax.config import OptimConfig, TrainConfig
from gptjax.config.command_line import load_recipe
from gptjax.config.section import InputError
from gptjax.config.sweep import OWN, SweepConfig
from gptjax.scaling.sweep import work
from gptjax.scaling.sweep.jobs import add_points, read_jobs, write_jobs
from gptjax.scaling.sweep.points import decay_start, make_points
from gptjax.training.optim import make_schedule

STANDIN = Path(__file__).parent / "fake_pretrain.py"
STEP = {"16": 1434624, "32": 4048896}  # FLOPs of a step of the recipe below
RECIPE = '''"""Tiny."""
from gptjax.config import DataConfig, EvaluateConfig, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig


def pretrain(size: int = 16) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(num_layers=1, width=size, num_heads=1, dtype="float32", unroll=1),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
        data=DataConfig(source="words.txt", batch_size=2, length=16, validation_fraction=0.2),
        optim=OptimConfig(learning_rate=0.01, schedule="wsd", warmup_steps=2),
        evaluate=EvaluateConfig(max_rows=4),
    )
'''


def points(**steps: str) -> list[str]:
    """A grid by steps: s16="10 30" are two budgets that train size 16 for so many."""
    return [f"{int(n) * STEP[size[1:]]}:{size[1:]}" for size, counts in steps.items() for n in counts.split()]


GRID = points(s16="10 15 20 40", s32="10 30")


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return path


def jobs_of(recipe: Path, grid, before=(), **settings):
    cfg = SweepConfig(grid=tuple(grid), **settings)
    return add_points(before, make_points(cfg, load_recipe(str(recipe))), ["--x"])


def start(recipe: Path, out: Path, grid=GRID, workers: int = 1, **env: str) -> subprocess.Popen:
    command = [sys.executable, str(STANDIN), "sweep", str(recipe), str(out), str(workers), *grid]
    return commands.start(command, env=os.environ | env, start_new_session=True)


def table(out: Path) -> bytes:
    return (out / "table.csv").read_bytes()


def noted(out: Path) -> list[str]:
    return (out / "times.jsonl").read_text().splitlines() if (out / "times.jsonl").exists() else []


def starts(out: Path) -> list[str]:
    return sorted(line["job"] for line in map(json.loads, noted(out)) if line["event"] == "start")


# What is to be done.


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.4, 1 / 3, 1.0])
def test_before_its_decay_a_run_has_the_rates_of_any_longer_one(fraction):
    config = TrainConfig(optim=OptimConfig(schedule="wsd", warmup_steps=3, decay_fraction=fraction))
    longest = np.asarray(make_schedule(config.optim, 10**6)(np.arange(400)))
    for steps in (2, 5, 7, 10, 33, 100, 333, 400):
        rates, shared = np.asarray(make_schedule(config.optim, steps)(np.arange(steps))), decay_start(config, steps)
        assert np.array_equal(rates[:shared], longest[:shared])
        assert shared >= (1 - fraction) * steps - 1.01


def test_the_longest_run_saves_where_the_decay_of_each_other_begins(recipe, tmp_path):
    jobs = jobs_of(recipe, GRID)
    trunk, *branches = [job for job in jobs if job.size == "16"]
    assert (trunk.steps, trunk.parent, trunk.start, trunk.saves) == (40, "", 0, (8, 12, 16, 32))
    assert {job.parent for job in branches} == {trunk.name}
    assert [(job.steps, job.start) for job in branches] == [(20, 16), (15, 12), (10, 8)]
    assert trunk.flags[-5:] == ("--checkpoint.at", "8", "12", "16", "32")
    told = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in trunk.flags}
    assert set(OWN) - {"run_dir"} <= told
    assert all(job.tokens == 32 * job.steps and job.flops == STEP[job.size] * job.steps for job in jobs)
    write_jobs(tmp_path, jobs)
    assert read_jobs(tmp_path) == jobs == jobs_of(recipe, GRID, jobs) == jobs_of(recipe, reversed(GRID))


def test_a_longer_run_goes_on_from_the_last_trunk_and_no_job_changes(recipe):
    first = jobs_of(recipe, GRID)
    more = jobs_of(recipe, [*GRID, *points(s16="25 100 200")], first)
    assert more[: len(first)] == first
    found = {job.steps: job for job in more if job.size == "16"}
    assert (found[200].parent, found[200].start, found[200].saves) == (found[40].name, 32, (80, 160))
    assert (found[100].parent, found[100].start) == (found[200].name, 80)
    assert (found[25].parent, found[25].start, found[25].saves) == (found[40].name, 16, (20,))


def test_a_seed_has_a_trunk_of_its_own(recipe):
    jobs = jobs_of(recipe, [f"{20 * STEP['16']}:16@0,7", f"{40 * STEP['16']}:16@7"])
    assert {(job.seed, job.steps, job.start) for job in jobs} == {(0, 20, 0), (7, 40, 0), (7, 20, 16)}


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("entry", ["1e13", "1e13:", "0:4", "nan:4", "x:4", "1e13:4,", "1e13:4@", "1e13:4@x"])
def test_a_grid_of_another_form_is_one_line(entry):
    assert "wanted BUDGET:SIZE" in refused(SweepConfig, grid=(entry,))


def test_what_can_not_be_swept_is_one_line(recipe):
    assert "2 steps, whose decay begins within the warm-up of 2" in refused(jobs_of, recipe, points(s16="2"))
    assert "wanted 'wsd'" in refused(jobs_of, recipe, GRID, set=("optim.schedule=cosine",))
    first = jobs_of(recipe, GRID)
    for other in ("optim.beta2=0.9", "evaluate.max_rows=5"):  # each makes other losses
        assert "begun with other settings" in refused(jobs_of, recipe, GRID, first, set=(other,))
    assert jobs_of(recipe, GRID, first, set=("log_every=5",)) == first
    for own in ("steps=9", "run-dir=x", "evaluate.every=5"):
        assert f"no {own.split('=')[0]}, which the sweep sets" in refused(SweepConfig, set=(own,))
    assert "NAME=VALUE" in refused(SweepConfig, set=("steps",))
    assert "No closing quotation" in refused(jobs_of, recipe, GRID, set=("generate.prompt=Don't",))
    for seed in ("-1", str(2**31)):  # refused by its run, it would stand in the table for ever
        assert f"seed={seed}: wanted a number from 0" in refused(jobs_of, recipe, [f"{GRID[0]}@{seed}"])
    assert "grid is missing" in refused(jobs_of, recipe, [])
    assert "there is no setting --optim.beta3" in refused(jobs_of, recipe, GRID, set=("optim.beta3=0.9",))
    recipe.write_text(RECIPE.replace("length=16", "length=size, text_field=str(size)"))
    assert "data.text_field is '16' at one size and '32' at size 32" in refused(jobs_of, recipe, GRID)


FAILING = [sys.executable, "-c", "raise SystemExit(3)"]


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return f"data.source={path}"


def test_an_edited_recipe_is_refused_for_sizes_outside_the_grid_too(recipe, text, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "POLL", 0.01)
    begun = SweepConfig(out=str(tmp_path), grid=tuple(points(s16="10 40")), set=(text, "optim.beta2=0.9"))
    assert work.sweep(begun, load_recipe(str(recipe)), print, FAILING) == 3
    # A size keeps the --set that it was begun with; of the recipe, what is free may change.
    further = SweepConfig(out=str(tmp_path), grid=tuple(points(s32="10")), set=(text,))
    recipe.write_text(RECIPE.replace("optim=OptimConfig(", "optim=OptimConfig(ema=0.5, "))
    said = refused(work.sweep, further, load_recipe(str(recipe)), print, FAILING)
    assert "size 16 was begun with other settings (job 16_" in said and len(read_jobs(tmp_path)) == 2
    recipe.write_text(RECIPE.replace("return TrainConfig(", "return TrainConfig(log_every=5, seed=3, "))
    assert work.sweep(further, load_recipe(str(recipe)), print, FAILING) == 3 and len(read_jobs(tmp_path)) == 3


def test_several_workers_do_not_share_an_accelerator(recipe, text, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    cfg = SweepConfig(out=str(tmp_path / "sweep"), grid=tuple(GRID), workers=2)
    said = refused(work.sweep, cfg, load_recipe(str(recipe)), print, FAILING)
    assert said.startswith("workers=2: wanted 1 where a gpu computes") and not (tmp_path / "sweep").exists()
    alone = dataclasses.replace(cfg, workers=1, set=(text,))
    assert work.sweep(alone, load_recipe(str(recipe)), print, FAILING) == 3


def test_a_job_names_the_prepared_text_once(recipe, text, tmp_path):
    cfg = SweepConfig(out=str(tmp_path / "sweep"), grid=tuple(GRID), set=(text, "optim.beta2=0.9"))
    assert work.sweep(cfg, load_recipe(str(recipe)), print, FAILING) == 3
    prepared = str(tmp_path / "sweep" / "corpus")
    flags = {job.flags[2:7] for job in read_jobs(tmp_path / "sweep")}
    assert flags == {("--optim.beta2", "0.9", "--data.source", prepared, "--seed")}


def test_a_folder_that_can_not_be_written_to_is_one_line(recipe, tmp_path):
    (tmp_path / ".lock").mkdir()
    cfg = SweepConfig(out=str(tmp_path), grid=tuple(GRID))
    assert f"{tmp_path}/.lock: Is a directory" in refused(work.sweep, cfg, load_recipe(str(recipe)), print)


def test_a_damaged_table_of_jobs_is_one_line(recipe, tmp_path):
    write_jobs(tmp_path, jobs_of(recipe, GRID))
    whole = (tmp_path / "jobs.jsonl").read_text()
    for bad in (whole[:-5], "[]", '{"name": "x"}', whole.replace('"steps": 40', '"steps": "40"')):
        (tmp_path / "jobs.jsonl").write_text(bad)
        assert "no line of a job" in refused(read_jobs, tmp_path)
    (tmp_path / "jobs.jsonl").write_text("".join(whole.splitlines(keepends=True)[1:]))  # without a trunk
    assert "which is not in the table" in refused(read_jobs, tmp_path)


# How it is done, with a stand-in for training.


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> bytes:
    """The table of straight runs, each from its first step to its last in a sweep of its own."""
    folder, rows = tmp_path_factory.mktemp("straight"), []
    (folder / "tiny.py").write_text(RECIPE)
    for job in jobs_of(folder / "tiny.py", GRID):
        command = [sys.executable, str(STANDIN), "pretrain", "x", *job.flags[:2], *job.flags[3:]]
        run = folder / "runs" / job.name
        assert subprocess.run([*command, "--run-dir", str(run)], stdout=subprocess.DEVNULL).returncode == 0
        found = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        rows.append((job.name, found["eval_loss"]))
    return json.dumps(sorted(rows)).encode()


def losses(out: Path) -> bytes:
    lines = csv.DictReader((out / "table.csv").read_text().splitlines())
    return json.dumps(sorted((line["name"], float(line["loss"])) for line in lines)).encode()


def test_two_processes_run_every_job_once_with_the_losses_of_straight_runs(recipe, tmp_path, wanted):
    out = tmp_path / "sweep"
    both = [start(recipe, out, workers=workers, STANDIN_DELAY="0.02") for workers in (1, 2)]
    for code, errors in map(finish, both):
        assert code == 0, errors
    assert starts(out) == sorted(job.name for job in read_jobs(out))
    assert losses(out) == wanted
    before = table(out)
    assert finish(start(recipe, out))[0] == 0 and table(out) == before
    assert len(starts(out)) == len(read_jobs(out))


def kill_at_moments(recipe: Path, out: Path, times: int) -> int:
    """Kills the sweep with all that it started, at other moments in every run of the suite; returns how often."""
    rng, killed = random.Random(), 0
    for _ in range(times):
        process, before = start(recipe, out, workers=2, STANDIN_DELAY="0.02"), len(noted(out))
        while len(noted(out)) < before + rng.randint(1, 3) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        killed += kill_group(process)
    return killed


@pytest.mark.parametrize("sweeps, times", [(1, 2), pytest.param(10, 6, marks=pytest.mark.exhaustive)])
def test_a_sweep_that_was_killed_ends_with_the_same_table(recipe, tmp_path, wanted, sweeps, times):
    for out in (tmp_path / f"sweep{i}" for i in range(sweeps)):
        assert kill_at_moments(recipe, out, times) >= 1
        code, errors = finish(start(recipe, out, workers=2))
        assert code == 0 and losses(out) == wanted, errors


STOPS = [
    *("fork.copytree", "fork.replace", "table.replace"),
    *(pytest.param(name, marks=pytest.mark.exhaustive)
      for name in ("write_jobs", "write_table", "fork.truncate_after", "fork.write_json")),
]  # fmt: skip


@pytest.mark.parametrize("where", STOPS)
def test_a_kill_within_a_fork_or_a_table_leaves_no_half_of_one(recipe, tmp_path, where, wanted):
    out = tmp_path / "sweep"
    code, errors = finish(start(recipe, out, STANDIN_KILLS=where))
    assert code == -signal.SIGKILL, errors
    code, errors = finish(start(recipe, out))
    assert code == 0 and losses(out) == wanted, errors
    assert not [path for path in (out / "runs").iterdir() if path.name.startswith(".")]


def test_sigterm_ends_a_sweep_with_75_and_all_saved(recipe, tmp_path, wanted):
    out = tmp_path / "sweep"
    process = start(recipe, out, workers=2, STANDIN_DELAY="0.05")
    while len(noted(out)) < 2 or not list(out.glob("runs/*/metrics.jsonl")):
        time.sleep(0.02)
    time.sleep(0.3)
    process.terminate()
    code, errors = finish(process)
    assert code == 75 and "run the same command again" in errors, errors
    assert list(out.glob("runs/*/checkpoints/*/manifest.json"))
    assert finish(start(recipe, out, workers=2))[0] == 0 and losses(out) == wanted


def test_a_failed_job_ends_the_sweep_and_a_killed_one_runs_again(recipe, tmp_path, wanted):
    out = tmp_path / "sweep"
    name = next(job.name for job in jobs_of(recipe, GRID) if job.steps == 30)
    code, errors = finish(start(recipe, out, STANDIN_FAILS=f"{name}=3"))
    assert code == 3 and f"job {name} ended with 3" in errors and f"logs/{name}.log" in errors, errors
    code, errors = finish(start(recipe, out, STANDIN_FAILS=f"{name}=137"))
    assert code == 137 and errors.count(f"job {name} ended with 137") == 3, errors
    assert table(out).count(b"\n16_") == sum(job.size == "16" for job in read_jobs(out)), "the others went on"
    assert finish(start(recipe, out))[0] == 0 and losses(out) == wanted


def test_a_job_that_diverged_is_a_row_of_the_table_and_the_others_go_on(recipe, tmp_path, wanted):
    out = tmp_path / "sweep"
    trunk, lone = (next(job.name for job in jobs_of(recipe, GRID) if job.steps == steps) for steps in (40, 30))
    code, errors = finish(start(recipe, out, STANDIN_FAILS=f"{lone}=3", STANDIN_LOSS="nan"))
    ends = f"diverged at step 3, loss inf in table.csv: {lone} (to train it again, delete its run)"
    assert code == 3 and ends in errors, errors
    branch = next(job.name for job in jobs_of(recipe, GRID) if job.parent == lone)
    assert f"was given up: {branch}" in errors.splitlines()[-1]
    losses_of = dict(json.loads(losses(out)))
    assert losses_of.pop(lone) == float("inf") and losses_of.items() <= dict(json.loads(wanted)).items()
    assert len(losses_of) == sum(job.size == "16" for job in read_jobs(out)), "the others went on"
    before = starts(out)
    code, errors = finish(start(recipe, out, STANDIN_FAILS=f"{trunk}=3"))
    assert code == 3 and ends in errors and starts(out) == before, "nothing is left to do"
    shutil.rmtree(out / "runs" / lone)
    assert finish(start(recipe, out))[0] == 0 and losses(out) == wanted


@pytest.mark.parametrize(("code", "returned"), [(75, 3), (137, 137)])
def test_a_job_that_ends_without_progress_is_given_up_and_others_go_on(recipe, tmp_path, code, returned, monkeypatch):
    monkeypatch.setattr(work, "PAUSE", 0.01)
    monkeypatch.setattr(work, "POLL", 0.01)
    jobs, said = jobs_of(recipe, points(s16="10 40", s32="30")), []
    write_jobs(tmp_path, jobs)
    for name in ("runs", "logs", "claims"):
        (tmp_path / name).mkdir()
    workers = work._Workers(tmp_path, jobs, [sys.executable, "-c", f"raise SystemExit({code})"], 1, said.append)
    assert workers.work() == returned
    trunks = [job.name for job in jobs if not job.start]
    assert starts(tmp_path) == sorted(3 * trunks) and len(trunks) == 2
    for name in trunks:
        (line,) = (line for line in said if line.startswith(f"job {name} ended") and "3 times in a row" in line)
        assert line.endswith(f"without progress; see {tmp_path}/logs/{name}.log")
    (branch,) = (job.name for job in jobs if job.start)
    assert said[-1] == f"not started, for what they start from was given up: {branch}"


def test_a_branch_whose_checkpoint_is_damaged_starts_from_nothing_and_says_so(recipe, tmp_path, wanted):
    out = tmp_path / "sweep"
    trunk = next(job.name for job in jobs_of(recipe, GRID) if job.steps == 40)
    assert finish(start(recipe, out, points(s16="10 15 40")))[0] == 0
    (out / "runs" / trunk / "checkpoints" / "00000012" / "state").write_text("damaged")
    code, errors = finish(start(recipe, out))
    assert code == 0 and losses(out) == wanted, errors
    assert "starts from nothing: step 12" in errors and "state has" in errors, errors


def test_a_claim_outlives_its_sweep_with_the_job_that_still_runs(recipe, tmp_path, wanted):
    out = tmp_path / "sweep"
    process = start(recipe, out, STANDIN_DELAY="0.05")
    while not noted(out):
        time.sleep(0.02)
    process.kill()  # its child goes on
    process.communicate()
    code, errors = finish(start(recipe, out))
    assert code == 0 and losses(out) == wanted, errors
    assert len(starts(out)) == len(set(starts(out)))


def test_a_sweep_that_waits_for_other_processes_says_so(recipe, tmp_path):
    (job,) = jobs_of(recipe, points(s16="40"))
    said = []

    def say(line: str) -> None:
        said.append(line)
        workers._stop(0, None)

    workers = work._Workers(tmp_path, [job], [], 1, say)
    (tmp_path / "claims").mkdir()
    with (tmp_path / "claims" / job.name).open("a") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        assert workers.work() == 75
    assert said[0].startswith("waiting: other processes run what is left, 1 jobs")


# With training itself.


@pytest.mark.slow
def test_a_branch_ends_with_the_bits_of_a_straight_run(recipe, text, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    assert main(["sweep", str(recipe), "--out", "sweep", "--grid", *points(s16="5 10")]) == 0
    assert "next: gptjax fit sweep --out sweep/fit" in capfd.readouterr().err
    jobs = read_jobs(tmp_path / "sweep")
    branch = next(job for job in jobs if job.steps == 5)
    assert branch.start == 4
    command = [*GPTJAX, "pretrain", str(recipe), *branch.flags, "--run-dir", "straight"]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    ours, straight = tmp_path / "sweep" / "runs" / branch.name, tmp_path / "straight"
    curves = [curve((run / "metrics.jsonl").read_bytes()) for run in (ours, straight)]
    assert curves[0] == curves[1] and len(curves[0]) == 6
    assert f"after step {branch.start}" in (tmp_path / "sweep" / "logs" / f"{branch.name}.log").read_text()
    marks = [json.loads((run / "checkpoints/00000005/digests/data.json").read_text()) for run in (ours, straight)]
    assert marks[0] == marks[1]

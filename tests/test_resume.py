"""Promise 2: kill -9 at any moment, then the same command, gives an uninterrupted run's loss curve, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 240
SETTINGS = """
--steps {steps} --model.num-layers 2 --model.width 64 --model.num-heads 2 --model.dtype float32 --model.dropout 0.1
--tokenizer.kind bytes --tokenizer.vocab-size 258 --data.length 64 --data.batch-size 4 --data.source {text}
--optim.accumulate 2 --optim.warmup-steps 10 --evaluate.every 60 --evaluate.max-rows 8 --checkpoint.every 25
--checkpoint.keep-best 1 --no-tensorboard --no-sample
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(50)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choices(words, k=5000)))
    return path


def start(run: Path, text: Path, *more: str, steps: int = STEPS) -> subprocess.Popen:
    command = [sys.executable, "-m", "gptjax", "pretrain", "shakespeare_char", "--run-dir", str(run)]
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(text.parent / "cache")}
    command += SETTINGS.format(text=text, steps=steps).split() + list(more)
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple]:
    """Every training and evaluation line, without what a clock says."""
    kept = ("step", "updates", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte")
    return [tuple(line.get(k) for k in kept) for line in lines(run)]


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, errors = finish(start(run, text))
    assert code == 0, errors
    return run


@pytest.mark.slow
def test_a_run_killed_five_times_has_the_curve_of_one_that_was_not(tmp_path, text, uninterrupted):
    rng = random.Random()  # other moments in every run of the suite; the seed is not what is tested
    run, killed_at = tmp_path / "killed", []
    for _ in range(5):
        process, before = start(run, text), steps_logged(run)
        target = before + rng.randint(1, 45)
        while steps_logged(run) < target and process.poll() is None:
            time.sleep(rng.uniform(0, 0.02))
            if steps_logged(run) < before:
                before, target = 0, steps_logged(run) + target - before  # cut back to the restored step
        process.kill()
        code, errors = finish(process)
        assert code == -signal.SIGKILL, f"the run ended before it was killed; kills so far at {killed_at}: {errors}"
        killed_at.append(steps_logged(run))
    code, errors = finish(start(run, text))
    assert code == 0, errors
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, STEPS + 1)), killed_at
    assert curve(run) == curve(uninterrupted), killed_at


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_and_the_run_goes_on(tmp_path, text, uninterrupted):
    run = tmp_path / "terminated"
    process = start(run, text)
    while steps_logged(run) < 30 and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    code, errors = finish(process)
    assert code == 75, errors
    assert "run the same command again" in errors
    reached = lines(run)[-1]["step"]
    assert (run / "checkpoints" / f"{reached:08d}" / "manifest.json").is_file()
    code, errors = finish(start(run, text))
    assert code == 0 and f"after step {reached}" in errors, errors
    assert curve(run) == curve(uninterrupted)


@pytest.mark.slow
def test_a_finished_run_is_extended_by_more_steps_and_refuses_frozen_settings(tmp_path, text):
    run = tmp_path / "extended"
    assert finish(start(run, text, steps=20))[0] == 0
    code, errors = finish(start(run, text, steps=30))
    assert code == 0 and "steps was 20, now 30" in errors, errors
    assert lines(run)[-1]["step"] == 30
    code, errors = finish(start(run, text, "--model.width", "32", steps=30))
    assert code == 2 and "model.width was 64" in errors and len(errors.strip().splitlines()) == 1, errors

"""Promise 2: kill -9 at any moment, then the same command, gives an uninterrupted run's loss curve, bit for bit."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from commands import GPTJAX, curve, environment, finish, pretrain, start

STEPS = 240
SETTINGS = f"""
--steps {STEPS} --model.num-layers 2 --model.width 64 --model.num-heads 2 --model.dtype float32 --model.dropout 0.1
--tokenizer.kind bytes --tokenizer.vocab-size 258 --data.length 64 --data.batch-size 4 --optim.accumulate 2
--optim.warmup-steps 10 --evaluate.every 60 --evaluate.max-rows 8 --checkpoint.every 25 --checkpoint.keep-best 1
--sinks --no-sample
"""


def metrics(run: Path) -> bytes:
    path = run / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def steps_logged(run: Path) -> int:
    return metrics(run).count(b"\n")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, words) -> list[tuple]:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, errors = finish(pretrain(run, words, SETTINGS))
    assert code == 0, errors
    return curve(metrics(run))


@pytest.mark.slow
def test_a_run_killed_five_times_has_the_curve_of_one_that_was_not(tmp_path, words, uninterrupted):
    rng = random.Random()  # other moments in every run of the suite; the seed is not what is tested
    run, killed_at = tmp_path / "killed", []
    for _ in range(5):
        process, before = pretrain(run, words, SETTINGS), steps_logged(run)
        target = before + rng.randint(1, 45)
        while steps_logged(run) < target and process.poll() is None:
            time.sleep(rng.uniform(0, 0.02))
            if steps_logged(run) < before:
                before, target = 0, steps_logged(run) + target - before  # cut back to the restored step
        process.kill()
        code, errors = finish(process)
        assert code == -signal.SIGKILL, f"the run ended before it was killed; kills so far at {killed_at}: {errors}"
        killed_at.append(steps_logged(run))
    code, errors = finish(pretrain(run, words, SETTINGS))
    assert code == 0, errors
    assert [step for step, _, loss, *_ in curve(metrics(run)) if loss is not None] == list(range(1, STEPS + 1)), (
        killed_at
    )
    assert curve(metrics(run)) == uninterrupted, killed_at


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_and_the_run_goes_on(tmp_path, words, uninterrupted):
    run = tmp_path / "terminated"
    process = pretrain(run, words, SETTINGS)
    while steps_logged(run) < 30 and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    code, errors = finish(process)
    assert code == 75, errors
    assert "run the same command again" in errors
    reached = json.loads(metrics(run).splitlines()[-1])["step"]
    assert (run / "checkpoints" / f"{reached:08d}" / "manifest.json").is_file()
    again = start([*GPTJAX, "pretrain", str(run)], env=environment(words.parent / "cache"))  # and so by its folder
    code, errors = finish(again)
    assert code == 0 and f"after step {reached}" in errors, errors
    assert curve(metrics(run)) == uninterrupted

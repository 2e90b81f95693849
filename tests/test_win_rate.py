"""Laws of the win rate of one run over another: ties, the interval, both sides of a comparison."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from commands import refused, said
from stage_runs import MODEL, make_run, on_all_devices

from gptjax.cli import main
from gptjax.evals.win_rate import compare

pytestmark = pytest.mark.usefixtures("compile_cache")
REWARD = """--tokenizer.template llama2 --model.dtype float32 --data.length 64 --data.batch-size 8 --sinks --steps 1
--data.validation-fraction 0.2""".split()


def test_a_win_rate_counts_ties_as_half_and_has_wilsons_interval():
    """Eight of ten: 0.490 to 0.943, as Wilson's score interval is in every table."""
    found = compare(np.array([1.0] * 8 + [0, 0]), np.array([0.0] * 8 + [3, 1]))
    assert (found["win_rate"], found["ties"], found["prompts"]) == (0.8, 0, 10)
    assert (found["win_rate_low"], found["win_rate_high"]) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    assert found["reward_gain"] == pytest.approx(0.4)
    tied = compare(np.ones(3), np.ones(3))
    assert (tied["win_rate"], tied["ties"], tied["reward_gain_stderr"]) == (0.5, 3, 0.0)


@pytest.mark.slow
def test_two_runs_are_compared_by_a_reward_run(tmp_path, capsys):
    pairs = [{"prompt": word, "chosen": word.upper(), "rejected": word + "x"} for word in "abcdefghijkl"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    base, judge = make_run(tmp_path / "base"), tmp_path / "judge"
    words = ["reward", "chat", "--init", base, "--data.source", tmp_path / "pairs.jsonl", "--run-dir", judge, *REWARD]
    assert main(on_all_devices(words)) == 0
    far = dataclasses.replace(MODEL, init_std=2.0)  # from uniform, or one seed would draw the same answers
    a, b = (make_run(tmp_path / str(seed), seed, far, template="llama2") for seed in (0, 1))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in "abcdef"))
    how = ["--judge", judge, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 4, "--mesh.data", 8]

    def numbers(run: Path, against: Path, *more: object) -> dict[str, float]:
        lines = said(capsys, "eval", run, "--against", against, *how, *more).splitlines()
        return {name: float(x) for name, x in (line.split() for line in lines)}

    ours, theirs = numbers(a, b), numbers(b, a)
    assert ours["prompts"] == 6 and ours["reward"] != ours["reward_against"]
    assert ours["win_rate"] == pytest.approx(1 - theirs["win_rate"])
    assert ours["reward_gain"] == pytest.approx(-theirs["reward_gain"], rel=1e-4)
    itself = numbers(a, a, "--limit", 2)
    assert (itself["ties"], itself["win_rate"], itself["prompts"]) == (2, 0.5, 2)
    assert "all of --against, --judge, --prompts" in refused(capsys, "eval", a, "--against", b)
    assert main(["eval", str(a), "--against", str(base), *map(str, how)]) == 2
    assert "no chat template" in capsys.readouterr().err.splitlines()[-1]

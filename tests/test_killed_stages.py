"""Every stage that begins from a run, killed with SIGKILL at five moments, goes on as if nothing had been."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from PIL import Image
from stage_runs import assert_same, make_run

pytestmark = pytest.mark.usefixtures("compile_cache")

ALIKE = """--tokenizer.template llama2 --model.dtype float32 --data.length 64 --data.batch-size 8 --sinks --steps 6
--checkpoint.every 2 --evaluate.every 2 --optim.learning-rate 1e-2 --optim.warmup-steps 0 --data.validation-fraction 0.2
--no-sample""".split()
ROLLOUT = """--data.source prompts.jsonl --rewards.sources reward_of_stages:low --rewards.unfinished scored
--rollout.answers 4 --rollout.max-new-tokens 4 --rollout.minibatches 2 --rollout.epochs 2""".split()
IMAGES = "--model.vision.patch 4 --model.vision.side 8 --model.vision.layers 1 --model.vision.width 8".split()
STAGES = {
    "sft": ["sft", "--data.source", "chats.jsonl", "--lora.rank", "2"],
    "images": ["sft", "--data.source", "shown.jsonl", *IMAGES, "--model.vision.num-heads", "2"],
    "reward": ["reward", "--data.source", "pairs.jsonl"],
    "dpo": ["dpo", "--data.source", "pairs.jsonl", "--lora.rank", "2"],
    "grpo": ["grpo", *ROLLOUT],
    "ppo": [
        "ppo",
        *ROLLOUT,
        "--value.rank",
        "2",
        "--target-kl",
        "0.5",
        "--ptx.source",
        "text.txt",
        "--ptx.weight",
        "1",
    ],
}
# Before the first checkpoint, before a save, behind it, before an evaluation, and in the middle of an interval.
MOMENTS = [("_log", 1), ("_save", 2), ("_save+", 2), ("_evaluate", 4), ("_log+", 5)]
KILLED = """
import os, signal, sys
import gptjax.stages.runner as runner
moment, at = sys.argv[1], int(sys.argv[2])

def dies(function, after):
    def called(self, *args):
        i = next(x for x in args if isinstance(x, int))
        if i == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(self, *args)
        if i == at:
            self.checkpoints.wait() if name == "_save" else None
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return called

name, after = moment.rstrip("+"), moment.endswith("+")
setattr(runner.Runner, name, dies(getattr(runner.Runner, name), after))
from gptjax.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compile_cache) -> Path:
    """A base, and beside it records of each kind, a text and a reward."""
    folder, rng = tmp_path_factory.mktemp("stages"), random.Random(0)
    words = ["".join(rng.choices("abcdef", k=rng.randint(1, 6))) for _ in range(60)]
    records = {
        "chats": [{"prompt": word, "completion": word.upper()} for word in words],
        "pairs": [{"prompt": word, "chosen": word.upper(), "rejected": word + "x"} for word in words],
        "prompts": [{"prompt": word} for word in words],
        "shown": [{"image": f"{n % 9}.png", "prompt": word, "completion": str(n)} for n, word in enumerate(words)],
    }
    for n in range(9):
        Image.new("RGB", (8, 8), (28 * n, 255 - 28 * n, n)).save(folder / f"{n}.png")
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text("".join(rng.choices("the quick brown fox ", k=9000)))
    (folder / "reward_of_stages.py").write_text("def low(answer):\n    return sum(c < 'n' for c in answer) / 4\n")
    make_run(folder / "base")
    return folder


MARKS = {stage: pytest.mark.slow if stage == "ppo" else pytest.mark.exhaustive for stage in STAGES}


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=mark) for stage, mark in MARKS.items()])
def test_a_run_that_is_killed_at_five_moments_goes_on_bit_for_bit(stage, folder):
    verb, *words = STAGES[stage]
    straight, killed = folder / f"{stage}_straight", folder / f"{stage}_killed"

    def run(to: Path, *first: str) -> int:
        given = [verb, "chat", "--init", str(folder / "base"), "--run-dir", str(to), *ALIKE, *words]
        command = [sys.executable, *(first or ("-m", "gptjax")), *given]
        ended = subprocess.run(command, env=environment(folder / "cache"), cwd=folder, capture_output=True, text=True)
        assert ended.returncode in (0, -9), ended.stderr
        return ended.returncode

    assert run(straight) == 0
    assert [run(killed, "-c", KILLED, moment, str(at)) for moment, at in MOMENTS] == [-9] * 5
    assert run(killed) == 0
    assert_same(killed, straight)

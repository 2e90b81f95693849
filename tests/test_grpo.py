"""Laws of group-relative policy optimization: the first ratio is 1, exact resume, the same numbers everywhere."""

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from commands import environment, refused
from stage_runs import assert_same, lines, make_run, on_all_devices, stopped

from gptjax.align.checkable import closes_sentences
from gptjax.align.estimators import GROUP_ESTIMATORS
from gptjax.align.losses import policy_loss
from gptjax.cli import main
from gptjax.config import GrpoConfig, ModelConfig
from gptjax.training.step import make_init, make_train_step, several_updates

pytestmark = pytest.mark.usefixtures("compile_cache")
GRPO = """--model.dtype float32 --data.length 24 --data.batch-size 32 --sinks --steps 4 --checkpoint.every 2
--evaluate.every 2 --optim.learning-rate 5e-2 --optim.warmup-steps 0 --optim.schedule constant
--rollout.answers 4 --rollout.max-new-tokens 8
--rewards.unfinished scored --beta 0.01 --data.validation-fraction 0.2""".split()
RECIPE = "from gptjax.config import GrpoConfig\n\n\ndef grpo():\n    return GrpoConfig()\n"
REWARDS = """
def low(answer):
    return sum(ord(letter) < 100 for letter in answer) / 8

def even(prompts, answers, number, **others):
    return [float((len(answer) + n) % 2) for answer, n in zip(answers, number)]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, compile_cache):
    """A run of bytes with weights by chance; beside it prompts, a recipe and functions that give rewards."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "rewards_of_answers.py").write_text(REWARDS)
    lines = [json.dumps({"prompt": f"prompt {i}", "number": i}) for i in range(50)]
    (folder / "prompts.jsonl").write_text("\n".join([*lines, json.dumps({"prompt": "x" * 30, "number": 0})]))
    model = ModelConfig(num_layers=1, width=16, num_heads=2, positions="rope", dtype="float32")
    make_run(folder / "base", model=model, length=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder / "base"


def words(base: Path, run: Path, *more: object) -> list[str]:
    folder = base.parent
    given = ["--init", base, "--data.source", folder / "prompts.jsonl", "--run-dir", run]
    given += [] if "--rewards.sources" in more else ["--rewards.sources", "rewards_of_answers:low"]
    return on_all_devices(["grpo", folder / "recipe.py", *given, *GRPO, *more])


def grpo(base: Path, run: Path, *more: object) -> Path:
    assert main(words(base, run, *more)) == 0
    return run


def alone(base: Path, args: list[str], **how: float) -> None:
    """Runs a command in a process of its own, with one device: eight of them wait long for each other."""
    env = environment(base.parent / "cache")
    env["PYTHONPATH"] += os.pathsep + str(base.parent)
    subprocess.run([sys.executable, "-m", "gptjax", *args], env=env, check=True, **how)


@pytest.fixture(scope="module")
def trained(base) -> Path:
    alone(base, words(base, base.parent / "trained", "--mesh.data", 1))
    return base.parent / "trained"


def of(run: Path, *names: str) -> np.ndarray:
    return np.array([[line[name] for name in names] for line in lines(run) if "loss" in line])


LORA = ["--lora.rank", 2]
OTHER = ["--estimator", "grpo", *LORA, "--optim.accumulate", 2, "--steps", 2]


@pytest.mark.parametrize("more", [[], pytest.param(OTHER, marks=pytest.mark.slow)], ids=["whole", "lora"])
def test_the_first_ratio_is_exactly_1_and_nothing_has_moved(more, trained, base, tmp_path):
    run = grpo(base, tmp_path / "lora", *more) if more else trained
    first = lines(run)[0]
    assert first["ratio_max"] == 1.0 and first["clip_fraction"] == 0.0 and first["kl_old"] == 0.0
    assert not any(first[name] for name in ("kl", "kl_k2", "kl_k3", "kl_token"))
    assert 0 < first["log_p_gap_max"] <= 2e-4 and first["log_p_gap"] <= first["log_p_gap_max"]
    assert (of(run, "ratio_max") == 1).all(), "one update a rollout"


def test_the_first_update_of_a_rollout_compares_the_policy_with_itself():
    """Whatever rounding makes of its log-probabilities in another program; the updates behind it compare with that."""

    def log_probs(params, frozen, batch):
        return params["log_p_L"] + 0 * batch["mask_BL"], batch["mask_BL"]

    given_BL = np.zeros((4, 3), np.float32)
    batch = {"mask_BL": given_BL + 1, "old_log_p_BL": given_BL - 1e-3, "advantage_BL": given_BL + 1}
    batch |= {"ref_log_p_BL": given_BL, "fresh_B": np.ones(4, np.float32)}
    tx = optax.sgd(0.0)
    state = make_init(lambda key: {"log_p_L": jax.numpy.zeros(3)}, tx)(0)
    for minibatches, ratio in ((1, 1.0), (2, np.exp(np.float32(1e-3)))):
        step = several_updates(make_train_step(policy_loss(log_probs), tx, lambda update: 0.0), 1, minibatches)
        _, metrics = jax.jit(step)(state, {}, batch)
        np.testing.assert_allclose(metrics["ratio_max"], ratio, rtol=1e-6)
        assert minibatches > 1 or metrics["ratio_max"] == 1.0


@pytest.mark.slow
def test_several_updates_on_a_rollout_move_away_from_it(base, tmp_path):
    moved = grpo(base, tmp_path / "several", "--rollout.epochs", 2, "--rollout.minibatches", 2, "--steps", 2)
    assert lines(moved)[0]["updates"] == 4 and lines(moved)[0]["ratio_max"] > 1.001
    assert lines(moved)[0]["learning_rate"] == pytest.approx(5e-2)


def test_the_reward_rises_and_the_run_says_what_its_numbers_were(trained, capsys):
    steps, evaluations = ([x for x in lines(trained) if name in x] for name in ("loss", "eval_loss"))
    last = evaluations[-1]
    assert steps[-1]["kl"] > 0.01 and last["eval_reward"] > steps[0]["reward"] + 0.05
    assert last["eval_loss"] == pytest.approx(0.01 * last["eval_kl"] - last["eval_reward"])
    assert 0 < last["eval_reward_stderr"] < 0.2 and steps[0]["length"] <= 8 and steps[0]["reward_std"] > 0
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [2] * 8 + [4] * 8
    assert all(s["prompt"].startswith("prompt ") and 0 <= s["reward"] <= 1 for s in samples)
    page = (trained / "report.html").read_text()
    assert "Answers to held-out prompts" in page and "KL to the reference" in page
    assert main(["generate", str(trained), "--prompt", "prompt 1", "--max-new-tokens", "4"]) == 0
    assert main(["data", "show", str(trained), "--step", "2"]) == 0
    assert "prompt " in capsys.readouterr().out
    assert "holds out prompts, no text; wanted --tasks" in refused(capsys, "eval", trained).splitlines()[-1]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(trained, base, tmp_path, capsys):
    moved = stopped(trained, tmp_path / "moved", 2)
    assert "name it again: --rewards.sources rewards_of_answers:low" in refused(capsys, "grpo", moved)
    alone(base, ["grpo", str(moved), "--rewards.sources", "rewards_of_answers:low"])
    assert_same(moved, trained)


NUMBERS = ("loss", "grad_norm", "reward", "kl", "length")
OF_TOKENS = ("entropy", "clip_fraction")


# A product that is added 16 times, and steps of 5e-2, saturate the attention: there a relative change of 1e-6 in the
# leaves, which Adam makes of the rounding of gradients of 6e-8, is one of 1e-4 in the next gradient, on one mesh, too.
GENTLE = [*LORA, "--optim.learning-rate", 1e-3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], GENTLE], ids=["whole", "lora"])
def test_padding_accumulation_and_mesh_change_no_number(kind, base, tmp_path, highest_precision):
    more = [*kind, "--rollout.minibatches", 2, "--steps", 10, "--mesh.data", 1]
    ways = {
        "one": ["--mesh.fsdp", 8],
        "mesh": ["--mesh.fsdp", 4, "--mesh.tensor", 2],
        "parts": ["--mesh.fsdp", 4, "--mesh.tensor", 2, "--optim.accumulate", 2],
        "padded": ["--mesh.fsdp", 8, "--data.length", 32],
    }
    runs = {name: grpo(base, tmp_path / name, *more, *words) for name, words in ways.items()}
    wanted = of(runs["one"], *NUMBERS)
    assert len(wanted) == 10
    for name in ("mesh", "parts", "padded"):
        np.testing.assert_allclose(of(runs[name], *NUMBERS), wanted, rtol=2e-4, atol=2e-5, err_msg=name)
        # Micro-batches are averaged by their answers, so that means over tokens move where answers differ in length.
        atol = 2e-3 if name == "parts" else 2e-5
        np.testing.assert_allclose(of(runs[name], *OF_TOKENS), of(runs["one"], *OF_TOKENS), rtol=2e-4, atol=atol)


def test_an_estimator_is_one_that_is_there_and_its_name_says_what_it_converges_to():
    names = typing.get_args(typing.get_type_hints(GrpoConfig)["estimator"])
    assert set(names) == set(GROUP_ESTIMATORS) and GrpoConfig().estimator == "rloo"
    assert GROUP_ESTIMATORS["rloo"].fixed_point.startswith("ref exp(r / beta) / Z, the optimum")


def test_lines_close_sentences_or_do_not():
    given = {"Well.\n": 1, "Is it?\nWell,\n": 0.5, 'He said "no!"\nand': 1, "no whole line.": 0, "So.\nSo.\n": 0, "": 0}
    assert [closes_sentences(answer) for answer in given] == list(given.values())


def test_wrong_input_is_one_line(base, tmp_path, capsys):
    run = tmp_path / "run"
    source = "rewards_of_answers"
    early = {
        ("--estimator", "gpro"): "--estimator",
        ("--rollout.answers", 1): "rollout.answers=1: wanted at least 2 with gptjax grpo",
        ("--rollout.answers", 5): "data.batch_size=32: wanted a multiple of rollout.answers = 5",
        ("--rollout.max-new-tokens", 24): "rollout.max_new_tokens=24: wanted at most data.length - 1 = 23",
        ("--init", "runs/nope"): "runs/nope: no folder; wanted the folder of a run",
        ("--data.source", base.parent / "recipe.py"): "holds no prompts; wanted a file .jsonl",
        ("--model.num-layers", 3): "model.num_layers=3: wanted 1, as in init=",
    }
    for more, said in early.items():
        assert said in refused(capsys, *words(base, run, *more))
    assert main(words(base, run, "--rewards.sources", f"{source}:nope")) == 2
    said = f"wanted module:name of a function that Python can import here (module '{source}' has no"
    assert said in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 30}) + "\n")
    assert main(words(base, run, "--data.source", tmp_path / "long.jsonl")) == 2
    assert "0 of 1 prompts leave room for rollout.max_new_tokens=8" in capsys.readouterr().err.splitlines()[-1]
    assert not run.exists()

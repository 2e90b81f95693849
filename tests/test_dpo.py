"""Laws of direct preference optimisation as a stage: step zero, all pairs of a prompt, exact resume, LoRA, mesh."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refused, said
from stage_runs import assert_same, lines, make_run, on_all_devices, stopped

from gptjax.align.answers import answer_log_probs
from gptjax.align.losses import preference_loss, preference_terms
from gptjax.align.objectives import dpo_loss
from gptjax.cli import main
from gptjax.data.preferences import PreferenceRows, RankedAnswers
from gptjax.model.decoder import init_params, make_decoder
from gptjax.runs.run import load_config

pytestmark = pytest.mark.usefixtures("compile_cache")
DPO = """--tokenizer.template llama2 --model.dtype float32 --data.length 64 --data.batch-size 8 --sinks --steps 6
--checkpoint.every 3 --evaluate.every 3 --optim.learning-rate 1e-2 --optim.warmup-steps 0 --no-sample
--data.validation-fraction 0.2""".split()
LORA = ["--lora.rank", "2"]


def write(path: Path, count: int = 80, answers: int = 2) -> Path:
    """Questions whose answer in capitals is better than one in other letters; the last one does not fit."""
    rng, lines = random.Random(0), []
    for _ in range(count):
        word = "".join(rng.choices("abcdef", k=rng.randint(1, 6)))
        wrong = ["".join(rng.choices("xyz", k=rng.randint(1, 6))) + "." * i for i in range(1, answers)]
        lines.append({"prompt": word, "answers": [word.upper(), *wrong]})
    lines.append({"prompt": "x" * 99, "chosen": "y", "rejected": "z"})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, compile_cache) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    write(folder / "pairs.jsonl")
    return make_run(folder / "base")


def tune(base: Path, run: Path, *more: object, source: str = "pairs.jsonl", code: int = 0) -> Path:
    words = ["dpo", "chat", "--init", base, "--data.source", base.parent / source, "--run-dir", run, *DPO, *more]
    assert main(on_all_devices(words)) == code
    return run


@pytest.fixture(scope="module")
def whole(base) -> Path:
    return tune(base, base.parent / "whole")


@pytest.fixture(scope="module")
def adapted(base) -> Path:
    return tune(base, base.parent / "adapted", *LORA)


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_the_first_step_is_the_reference_and_the_policy_then_prefers_as_told(kind, request):
    run = request.getfixturevalue(kind)
    first, last = lines(run)[0], [x for x in lines(run) if "eval_loss" in x][-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-7)
    zero = ("margin", "reward_chosen", "reward_rejected", "drift")
    assert [first[name] for name in zero] == [0.0] * 4 and first["accuracy"] == 0.5
    assert first["log_p_chosen"] < 0 and first["tokens"] == 8 * 2 * 64, "an answer is a row"
    assert last["eval_loss"] < math.log(2) - 0.05 and last["eval_accuracy"] > 0.9 and last["eval_margin"] > 0.1
    assert last["eval_reward_chosen"] - last["eval_reward_rejected"] == pytest.approx(last["eval_margin"], rel=1e-5)
    assert 0 <= last["eval_accuracy_stderr"] < 0.2 and last["eval_drift"] > 0
    assert load_config(run).stage == "dpo" and "Accuracy" in (run / "report.html").read_text()


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, request, tmp_path):
    straight = request.getfixturevalue(kind)
    moved = stopped(straight, tmp_path / "moved", 3)
    assert main(["dpo", str(moved)]) == 0
    assert_same(moved, straight)


def batch_of(prompts: list[RankedAnswers], length: int = 12) -> dict[str, np.ndarray]:
    return PreferenceRows(prompts, length).lay_out(prompts)


def ranked(rng: np.random.Generator, count: int) -> RankedAnswers:
    """A prompt of three tokens and answers of two to eight."""
    prompt = rng.integers(0, 256, 3).tolist()
    answers = [rng.integers(0, 256, rng.integers(2, 9)).tolist() for _ in range(count)]
    return RankedAnswers([([*prompt, *a], [0] * 3 + [1] * len(a)) for a in answers], list(range(count)))


def test_log_probabilities_of_answers_by_hand_and_all_pairs_of_a_prompt_are_one_element(base, highest_precision):
    """The sum over an answer's tokens alone, and the loss as a mean over prompts of the mean over their pairs."""
    decoder, rng = make_decoder(load_config(base)), np.random.default_rng(0)
    params, reference = (jax.jit(init_params(decoder))(jax.random.key(seed)) for seed in (0, 1))
    prompts = [ranked(rng, count) for count in (3, 2, 3, 2)]
    batch = batch_of(prompts)

    @jax.jit
    def forward(params, ids_BL):
        x_BLD, _ = decoder.apply({"params": params}, ids_BL, jnp.arange(12)[None], jnp.ones_like(ids_BL))
        logits = jnp.asarray(decoder.apply({"params": params}, x_BLD, method="logits"))
        return jax.nn.log_softmax(logits[0, :, :258])

    def by_hand(params, ids: Sequence[int]) -> float:
        log_p = np.asarray(forward(params, np.array([[*ids, *[0] * (12 - len(ids))]])), np.float64)
        return sum(log_p[i - 1, ids[i]] for i in range(3, len(ids)))

    log_probs = jax.jit(answer_log_probs(decoder))
    got, ref = np.asarray(log_probs(params, batch)), np.asarray(log_probs(reference, batch))
    losses = []
    for row, prompt in enumerate(prompts):
        want = [by_hand(params, ids) for ids, _ in prompt.answers]
        np.testing.assert_allclose(got[row, : len(want)], want, rtol=1e-5)
        assert not got[row, len(want) :].any()
        ratios = [by_hand(params, ids) - by_hand(reference, ids) for ids, _ in prompt.answers]
        pairs = [(i, j) for i in range(len(want)) for j in range(i + 1, len(want))]
        losses.append(np.mean([math.log1p(math.exp(-0.1 * (ratios[i] - ratios[j]))) for i, j in pairs]))
    given = (lambda p, f, b: log_probs(p, b)), (lambda p, f, b: log_probs(f["base"], b))
    loss_fn = jax.jit(preference_loss(*given, beta=0.1))
    loss, metrics = loss_fn(params, {"base": reference}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert metrics["weight"] == 4
    # A row of padding, and longer rows, change nothing.
    padded = PreferenceRows(prompts, 20).lay_out([*prompts, None])
    more, counted = loss_fn(params, {"base": reference}, padded, jax.random.key(0))
    np.testing.assert_allclose(more, loss, rtol=1e-6)
    assert counted["weight"] == 4 and jax.tree.all(jax.tree.map(np.isfinite, counted))
    np.testing.assert_allclose(counted["accuracy"], metrics["accuracy"], rtol=1e-6)
    pair = ref[1:2, :2] + np.array([[1.0, 3.0]])  # by two answers: the objective of their margin
    ranks = jnp.array([[0, 1]]), jnp.ones((1, 2))
    terms, _ = preference_terms(jnp.asarray(pair), jnp.asarray(ref[1:2, :2]), *ranks, 0.1)
    np.testing.assert_allclose(terms["loss"], dpo_loss(jnp.array([-2.0]), 0.1), rtol=1e-5)
    assert terms["accuracy"] == 0 and terms["drift"] == pytest.approx(2)


@pytest.mark.slow
def test_a_mesh_and_accumulation_change_no_loss(base, tmp_path, highest_precision):
    write(base.parent / "three.jsonl", answers=3)
    for lora in ([], LORA):
        curves = {}
        for name, words in {
            "one": ["--mesh.fsdp", "8"],
            "mesh": ["--mesh.fsdp", "4", "--mesh.tensor", "2"],
            "parts": ["--mesh.fsdp", "4", "--mesh.tensor", "2", "--optim.accumulate", "2"],
        }.items():
            more = ["--steps", "10", "--mesh.data", "1", *lora, *words]
            run = tune(base, tmp_path / f"{name}{len(lora)}", *more, source="three.jsonl")
            curves[name] = [x[n] for x in lines(run) for n in ("loss", "eval_loss", "eval_margin") if n in x]
        assert len(curves["one"]) == 18
        for name in ("mesh", "parts"):
            np.testing.assert_allclose(curves[name], curves["one"], rtol=1e-4, atol=1e-6)


def test_the_verbs_that_read_a_run_read_this_one(adapted, capsys):
    held = [x for x in lines(adapted) if "eval_loss" in x][-1]
    told = said(capsys, "eval", adapted)
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_reference_ranking_accuracy"):
        assert f"{name} {held[name]:.6g}"[:-1] in told
    shown = said(capsys, "data", "show", adapted, "--step", "1", "--rows", "2")
    assert shown.count("row ") == 4 and shown.count("weighted targets") > 4
    assert said(capsys, "generate", adapted, "--chat", "--prompt", "abc", "--max-new-tokens", "2")


def test_wrong_input_is_one_line(base, whole, tmp_path, capsys):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    named = ["--init", base, "--tokenizer.template", "llama2", "--data.length", 64, "--run-dir", tmp_path / "run"]
    named += ["--mesh.data", 8, "--data.batch-size", 8]
    pairs = ["--data.source", base.parent / "pairs.jsonl"]
    wrong = {
        (*named, *pairs, "--beta", 0): "beta=0.0: wanted",
        (*named, *pairs, "--model.dropout", 0.1): "model.dropout=0.1: wanted 0 with gptjax dpo",
        (*named, *pairs, "--loss", "a:b"): "loss='a:b': wanted none with gptjax dpo",
        (*named, "--data.source", base.parent / "a.txt"): "does not exist",
        (*named, *pairs, "--kind", "kto"): "kto",
    }
    for words, told in wrong.items():
        assert told in refused(capsys, "dpo", "chat", *words)
    assert main(["dpo", "chat", *map(str, [*named, "--data.source", tmp_path / "chats.jsonl"])]) == 2
    assert "chats.jsonl:1 has prompt, completion; wanted" in capsys.readouterr().err.splitlines()[-1]
    assert "goes on by: gptjax dpo" in refused(capsys, "sft", whole)

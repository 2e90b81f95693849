"""Laws of reward models: scores at the last token, all pairs of a prompt as one, exact resume, on any mesh."""

import json
import math
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refused
from stage_runs import MODEL, assert_same, lines, make_run, on_all_devices, stopped
from test_preferences import ranked

from gptjax.align.scoring import Answer, Rewards
from gptjax.cli import main
from gptjax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    RewardConfig,
    RewardsConfig,
    TokenizerConfig,
    TrainConfig,
)
from gptjax.config.section import InputError
from gptjax.data.pairs import PreferenceData
from gptjax.data.preferences import AnswerTrees, shares_prompts
from gptjax.evals.preferences import AnswerScorer, load_scorer, pair_metrics
from gptjax.model.decoder import init_params, make_decoder
from gptjax.model.heads import add_heads, answer_scores
from gptjax.parallel.sharding import make_mesh
from gptjax.runs.load import load_model
from gptjax.runs.run import load_config
from gptjax.stages.reward import pairwise_loss

pytestmark = pytest.mark.usefixtures("compile_cache")
REWARD = """--tokenizer.template llama2 --model.dtype float32 --data.length 64 --data.batch-size 8 --sinks --steps 6
--checkpoint.every 3 --evaluate.every 3 --optim.learning-rate 1e-2 --data.validation-fraction 0.2""".split()
LORA = ["--lora.rank", "2"]


def write(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Answers in capitals are better than in small letters, and these than digits; some prompts have a tie."""
    rng, lines = random.Random(seed), []
    for i in range(count):
        word = "".join(rng.choices("abcdef", k=rng.randint(1, 5)))
        answers = [word.upper(), word + "x", "12", "345"][: 2 + i % 3]
        tie = {"ranks": [0, 1, 2, 2]} if i % 3 == 2 else {}
        pair = {"chosen": answers[0], "rejected": answers[1]} if i % 3 == 0 else {"answers": answers} | tie
        lines.append(json.dumps({"prompt": word} | pair))
    lines.append(json.dumps({"prompt": "x" * 99, "chosen": "X", "rejected": "y"}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, compile_cache) -> Path:
    """A run of bytes, as if it had been imported, with preferences beside it."""
    folder = tmp_path_factory.mktemp("reward")
    write(folder / "pairs.jsonl")
    return make_run(folder / "base")


def words(base: Path, run: Path, *more: object) -> list[str]:
    given = ["reward", "chat", "--init", base, "--data.source", base.parent / "pairs.jsonl", "--run-dir", run]
    return on_all_devices([*given, *REWARD, *more])


def train(base: Path, run: Path, *more: object) -> Path:
    assert main(words(base, run, *more)) == 0
    return run


def preferences(run: Path) -> PreferenceData:
    config = load_config(run)
    assert isinstance(config, RewardConfig)
    return PreferenceData(config, run / "data", training=False, trees=True)


@pytest.fixture(scope="module")
def tuned(base) -> Path:
    return train(base, base.parent / "tuned")


@pytest.fixture(scope="module")
def adapted(base) -> Path:
    return train(base, base.parent / "adapted", *LORA)


@pytest.fixture(scope="module")
def model():
    """A decoder with a score, its weights large enough that tokens matter."""
    config = TrainConfig(
        model=ModelConfig(num_layers=2, width=16, num_heads=2, dtype="float32"),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
        data=DataConfig(length=32),
    )
    decoder = make_decoder(config)
    params = jax.jit(add_heads(init_params(decoder), ("score_D",), config))(jax.random.key(0))
    return decoder, jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)


PROMPTS = [ranked([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 7], given=2, ranks=[0, 1, 1]), ranked([9, 8], [9, 7], given=1)]


def score(model, share: bool, length: int = 32, prompts=PROMPTS) -> np.ndarray:
    decoder, params = model
    batch = AnswerTrees(prompts, length, 0, share).lay_out(prompts)
    return np.asarray(jax.jit(answer_scores, static_argnums=0)(decoder, params, batch))


def test_a_score_is_read_at_the_last_token_and_sharing_and_padding_change_none(model, highest_precision):
    """By hand: the head's product with the last hidden state of each answer in a row of its own."""
    decoder, params = model
    found = score(model, True)
    for prompt, score_S in zip(PROMPTS, found):
        for (ids, _), got in zip(prompt.answers, score_S):
            row = jnp.array([ids])
            x_BLD, _ = decoder.apply({"params": params}, row, jnp.arange(len(ids))[None], jnp.ones_like(row))
            assert got == pytest.approx(float(x_BLD[0, -1] @ params["score_D"]), rel=1e-5, abs=1e-6)
    there = np.array([[1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_allclose(score(model, False)[there], found[there], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score(model, True, length=16)[there], found[there], rtol=1e-5, atol=1e-6)
    assert len({*np.round(found[there], 4)}) == 5, "answers differ"
    mesh = make_mesh(MeshConfig())
    scorer = AnswerScorer(decoder, params, mesh, 0.5, batch_tokens=32)
    ids = [ids for prompt in PROMPTS for ids, _ in prompt.answers]
    np.testing.assert_allclose(scorer(ids), found[there] - 0.5, rtol=1e-5, atol=1e-6)


def test_all_pairs_of_a_prompt_are_one_element_and_ties_make_none(model, highest_precision):
    decoder, params = model
    batch = AnswerTrees(PROMPTS, 32, 0, True).lay_out([*PROMPTS, None])
    loss, metrics = jax.jit(pairwise_loss(decoder))(params, {}, batch, jax.random.key(0))
    (a, b, c), (d, e, _) = score(model, True).astype(np.float64)
    of_prompts = (np.log1p(np.exp(b - a)) + np.log1p(np.exp(c - a))) / 2, np.log1p(np.exp(e - d))
    assert loss == pytest.approx(sum(of_prompts) / 2, rel=1e-5) and metrics["weight"] == 2
    assert metrics["accuracy"] == pytest.approx((((a > b) + (a > c)) / 2 + (d > e)) / 2)


def test_accuracy_and_calibration_of_scores_worked_out_by_hand():
    third = math.log(2)  # sigmoid(log 2) = 2/3
    score_BS = np.array([[third, 0, 0], [0, third, 9], [3 * third, 0, 0], [0, 0, 0]], np.float32)
    rank_BS = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 0], [0, 0, 0]])
    mask_BS = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    metrics, table = pair_metrics(score_BS, rank_BS, mask_BS)
    assert metrics["eval_pairs"] == 4 and metrics["eval_accuracy"] == pytest.approx(2 / 3)
    assert metrics["eval_accuracy_stderr"] == pytest.approx(1 / 3)
    assert metrics["eval_loss"] == pytest.approx((math.log(1.5) + math.log(3) + math.log(9 / 8)) / 3)
    low, high = (pytest.approx(x) for x in ([0.65, 3, 2 / 3, 2 / 3], [0.85, 1, 8 / 9, 1]))
    assert table == [low, high]
    assert metrics["eval_calibration_error"] == pytest.approx(1 / 4 * 1 / 9)
    assert metrics["eval_score_best"] == pytest.approx(4 * third / 3)


def test_prompts_are_shared_unless_a_window_or_a_block_forbids_it():
    assert shares_prompts(MODEL, 64) and not shares_prompts(MODEL, 4096)
    windowed = ModelConfig(num_layers=2, width=16, num_heads=2, positions="rope", window=32)
    assert shares_prompts(windowed, 32) and not shares_prompts(windowed, 64)


def test_a_run_learns_to_score_and_its_demonstrations_score_0(tuned, base, capsys, tmp_path):
    config = load_config(tuned)
    assert (config.stage, config.heads, config.model.width) == ("reward", ("score_D",), 16)
    found = [line for line in lines(tuned) if "eval_loss" in line]
    assert len(found) == 2 and found[1]["eval_loss"] < found[0]["eval_loss"] < 1.5
    assert {"eval_accuracy", "eval_accuracy_stderr", "eval_calibration_error"} <= found[1].keys()
    capsys.readouterr()
    assert main(["eval", str(tuned)]) == 0
    out, err = capsys.readouterr()
    assert f"eval_accuracy {found[1]['eval_accuracy']:.6g}" in out and "eval_loss" in out
    assert main(["data", "show", str(tuned), "--step", "1"]) == 0
    assert "[INST]" in capsys.readouterr().out
    scorer, _ = load_scorer(tuned, MeshConfig(data=-1))
    data = preferences(tuned)
    best = data.demonstrations("", 10**6)
    assert len(best) == data.train.num_rows > 30 and abs(scorer(best).mean()) < 1e-5
    kept = json.loads((tuned / "scores.json").read_text())
    assert kept["step"] == 6 and kept["demonstrations"] == len(best) and abs(kept["mean"]) > 1e-3
    assert sum(row[1] for row in kept["reliability"]) == kept["eval_pairs"]
    page = (tuned / "report.html").read_text()
    assert "Reliability on held-out pairs" in page and f"{kept['reliability'][-1][3]:.3f}</td></tr></table>" in page


def test_demonstrations_may_be_conversations(tuned, tmp_path):
    data = preferences(tuned)
    chats = [{"prompt": "abc", "completion": "ABC"}, {"prompt": "x" * 99, "completion": "y"}, {"prompt": "d"}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (ids,) = data.demonstrations(str(tmp_path / "chats.jsonl"), 1)
    assert bytes(i for i in ids if i < 256).endswith(b"abc [/INST] ABC ") and ids[-1] == data.tokenizer.eos_id
    with pytest.raises(ValueError, match="chats.jsonl:3 has a prompt and no completion"):
        data.demonstrations(str(tmp_path / "chats.jsonl"), 2)
    (tmp_path / "long.jsonl").write_text(json.dumps(chats[1]))
    with pytest.raises(ValueError, match="demonstrations=.*: no answer fits into data.length=64"):
        data.demonstrations(str(tmp_path / "long.jsonl"), 2)
    assert len(data.demonstrations("", 5)) == 5


@pytest.mark.parametrize("kind", ["tuned", "adapted"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, request, base, tmp_path):
    straight = request.getfixturevalue(kind)
    moved = stopped(straight, tmp_path / "moved", 3)
    assert main(["reward", str(moved)]) == 0
    assert_same(moved, straight)


def test_an_adaptation_begins_as_its_base_with_the_same_head_and_trains_both(adapted, tuned, base):
    assert lines(adapted)[0]["loss"] == pytest.approx(lines(tuned)[0]["loss"], abs=1e-6), "b is 0"
    model, plain = load_model(adapted, MeshConfig(), heads=("score_D",)), load_model(base, MeshConfig())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), model.params, plain.params | {"score_D": 0.0})
    assert moved["layers"]["q_NDHK"] and moved["score_D"] and not moved["embed_VD"]
    assert np.isfinite(load_scorer(adapted, MeshConfig())[0]([[5, 6, 7]])).all()


def test_wrong_input_is_one_line(base, tuned, tmp_path, capsys):
    records = {
        "none": {"prompt": "a", "chosen": "b"},
        "same": {"prompt": "a", "answers": ["b", "b"]},
        "rank": {"prompt": "a", "answers": ["b", "c"], "ranks": [1, 1]},
        "long": {"prompt": "x" * 99, "chosen": "b", "rejected": "c"},
    }
    said = {
        "none": "none.jsonl:1 has prompt, chosen; wanted",
        "same": "answers 1 and 2 are equal",
        "rank": "ranks is [1, 1]; wanted 2 numbers",
        "long": "none of 1 preferences fits into rows of data.length = 64 tokens; raise --data.length",
    }
    for name, record in records.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
        given = words(base, tmp_path / "run", "--data.source", tmp_path / f"{name}.jsonl")
        assert main(given) == 2
        assert said[name] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    (tmp_path / "a.txt").write_text("text")
    source = words(base, tmp_path / "run", "--data.source", tmp_path / "a.txt")
    assert "holds no preferences; wanted a file .jsonl" in refused(capsys, *source)
    dropped = words(base, tmp_path / "run", "--model.dropout", 0.1)
    assert "model.dropout=0.1: wanted 0 with gptjax reward" in refused(capsys, *dropped)
    for verb in (["generate", tuned], ["export", tuned, tmp_path / "out"], ["sft", "chat", "--init", tuned]):
        line = refused(capsys, *map(str, verb))
        assert "reward model" in line, line
    half = shutil.copytree(tuned, tmp_path / "half")
    (half / "scores.json").unlink()
    for run, wanted in ((half, "goes on"), (base, "which has no score_D; wanted a run by gptjax reward")):
        with pytest.raises(ValueError, match=wanted):
            load_scorer(run, MeshConfig())


def test_a_reward_run_is_a_source_of_rewards_for_the_ids_of_its_tokenizer(tuned):
    scorer, model = load_scorer(tuned, MeshConfig())
    config, tokenizer = RewardsConfig(sources=(f"model={tuned}",), weights=(2.0,)), model.tokenizer
    answers = [Answer({"prompt": "a"}, "", ended, ids) for ended, ids in ((True, [1, 2, 3]), (False, [1, 2]))]
    rewards = Rewards(config, MeshConfig(), tokenizer)
    reward_B, by_source = rewards(answers)
    wanted_B = scorer([[1, 2, 3], [1, 2]])
    np.testing.assert_array_equal(by_source["reward_model"], wanted_B)
    np.testing.assert_array_equal(reward_B, np.array([2 * wanted_B[0], -1], np.float32))
    assert rewards.marks["model"]["step"] == 6 and len(rewards.marks["model"]["sha256"]) == 64
    tokenizer.template = "chatml"
    with pytest.raises(InputError, match="another tokenizer or chat template than the policy"):
        Rewards(config, MeshConfig(), tokenizer)


@pytest.mark.slow
def test_a_mesh_and_accumulation_change_no_loss(base, tmp_path, highest_precision):
    for lora in ([], LORA):
        curves: dict[str, list[float]] = {}
        means: dict[str, float] = {}
        for name, mesh in {
            "one": ["--mesh.fsdp", "8"],
            "mesh": ["--mesh.fsdp", "4", "--mesh.tensor", "2"],
            "parts": ["--mesh.fsdp", "4", "--mesh.tensor", "2", "--optim.accumulate", "2"],
        }.items():
            run = train(base, tmp_path / f"{name}{len(lora)}", "--steps", "10", "--mesh.data", "1", *lora, *mesh)
            numbers = json.loads((run / "scores.json").read_text())
            curves[name] = [*(x["loss"] for x in lines(run) if "loss" in x), numbers["eval_loss"]]
            means[name] = numbers["mean"]
        assert len(curves["one"]) == 11
        for name in ("mesh", "parts"):
            np.testing.assert_allclose(curves[name], curves["one"], rtol=5e-5)
            # No loss sees what all scores share, so that rounding alone moves it.
            assert means[name] == pytest.approx(means["one"], rel=1e-3)

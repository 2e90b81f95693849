"""Laws of PPO: the first update's ratio, the value function, the adapted KL, pretraining text beside, exact resume."""

import json
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import environment, finish, refused, start
from stage_runs import assert_same, lines, make_run, stopped

from gptjax.align.critic import actor_critic
from gptjax.cli import main
from gptjax.config import MeshConfig, ModelConfig, PpoConfig, ValueConfig
from gptjax.model.decoder import Decoder, head, init_params
from gptjax.model.heads import add_heads
from gptjax.runs.load import load_model
from gptjax.tokenizer import BytesTokenizer

pytestmark = pytest.mark.usefixtures("compile_cache")
REWARD = "first_letters_reward:share"
CODE = "def share(answer):\n    return sum(c < 'n' for c in answer) / 4\n"
PPO = f"""--rewards.sources {REWARD} --rewards.unfinished scored --model.dtype float32 --data.length 64
--data.batch-size 16 --rollout.max-new-tokens 4 --rollout.minibatches 1 --sinks --steps 4
--checkpoint.every 2 --evaluate.every 2 --optim.learning-rate 1e-2 --optim.warmup-steps 0 --value.rank 0
--log-every 1""".split()
KINDS = {
    "ptx": ["--ptx.source", "text.txt", "--ptx.weight", "1", "--target-kl", "0.5", "--horizon", "20"],
    "plain": ["--rollout.minibatches", "2", "--rollout.epochs", "2", "--value.rank", "2"],
    "lora": ["--lora.rank", "2", "--value.rank", "2", "--optim.ema", "0", "--optim.accumulate", "2"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, compile_cache) -> Path:
    """A run of bytes as if it had been imported, with prompts, a text and a reward beside it."""
    folder, rng = tmp_path_factory.mktemp("ppo"), random.Random(0)
    records = [{"prompt": "".join(rng.choices("abcdef", k=rng.randint(1, 6)))} for _ in range(60)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "text.txt").write_text("".join(rng.choices("the quick brown fox ", k=9000)))
    (folder / f"{REWARD.partition(':')[0]}.py").write_text(CODE)
    return make_run(folder / "base")


def words(base: Path, run: Path, *more: object) -> list[str]:
    given = ["--init", base, "--data.source", base.parent / "prompts.jsonl", "--run-dir", run]
    return ["ppo", "chat", *map(str, [*given, *PPO, *more])]


def process(base: Path, *given: object):
    """A command in a process of one device, in the folder where the reward and the text lie."""
    command = [sys.executable, "-m", "gptjax", *map(str, given)]
    return start(command, env=environment(base.parent / "cache"), cwd=base.parent)


def ppo(base: Path, run: Path, *more: object) -> Path:
    code, errors = finish(process(base, *words(base, run, *more)), 900)
    assert code == 0, errors
    return run


@pytest.fixture(scope="module")
def trained(base):
    """A finished run of a kind, made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = ppo(base, base.parent / kind, *KINDS[kind])
        return made[kind]

    return of


def test_the_first_step_has_ratio_1_and_no_kl_and_the_text_is_learned_beside_the_reward(trained):
    first, *_ = steps = [line for line in lines(trained("ptx")) if "loss" in line]
    assert [line["updates"] for line in steps] == [1, 2, 3, 4]
    for name in ("ratio_max", "kl", "kl_k2", "kl_k3", "kl_old", "clip_fraction", "explained_variance"):
        assert first[name] == (name == "ratio_max"), name
    assert first["log_p_gap_max"] < 2e-4 and 3 < first["length"] <= 4  # some end by themselves
    assert {"reward_std", "entropy", "value_loss", "ended", "beta", "ptx_loss"} <= first.keys()
    assert steps[-1]["kl_k3"] > 0 and steps[-1]["explained_variance"] != 0
    evaluations = [line for line in lines(trained("ptx")) if "eval_loss" in line]
    assert {"eval_reward", "eval_kl"} <= evaluations[-1].keys()
    assert evaluations[-1]["eval_loss_ptx"] < evaluations[0]["eval_loss_ptx"] < 5.6


def test_beta_is_adapted_to_the_kl_and_kept_by_a_checkpoint(trained):
    beta = np.float32(0.02)
    for line in [line for line in lines(trained("ptx")) if "loss" in line]:
        assert line["beta"] == pytest.approx(float(beta), rel=1e-5)
        beta *= 1 + np.clip(line["kl"] / 0.5 - 1, -0.2, 0.2) * 16 / 20
    assert beta < 0.02


@pytest.mark.slow
def test_an_adaptation_in_parts_begins_at_ratio_1_too(trained):
    first = next(line for line in lines(trained("lora")) if "loss" in line)
    assert (first["ratio_max"], first["kl"], first["kl_k3"], first["clip_fraction"]) == (1, 0, 0, 0)


@pytest.mark.slow
def test_several_updates_on_a_rollout_move_the_ratio(trained):
    steps = [line for line in lines(trained("plain")) if "loss" in line]
    assert steps[-1]["updates"] == 16 and steps[0]["ratio_max"] > 1 and steps[0]["kl_k3"] == 0


@pytest.mark.parametrize("kind", ["ptx", pytest.param("plain", marks=pytest.mark.slow),
                                  pytest.param("lora", marks=pytest.mark.slow)])  # fmt: skip
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, trained, base, tmp_path, monkeypatch, capsys):
    straight = trained(kind)
    moved = stopped(straight, tmp_path / "moved", 2)
    monkeypatch.chdir(base.parent)
    assert f"name it again: --rewards.sources {REWARD}" in refused(capsys, "ppo", moved)
    code, errors = finish(process(base, "ppo", moved, "--rewards.sources", REWARD), 900)
    assert code == 0, errors
    assert_same(moved, straight)


def test_a_value_function_reads_the_policys_states_or_those_of_its_own_trunk():
    model = ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32")
    decoder = Decoder(model, vocab_size=60, context=16)
    config = PpoConfig(model=model, value=ValueConfig(rank=2), init="base")
    ids_BL = jax.random.randint(jax.random.key(1), (2, 16), 0, 60)
    place_BL = jnp.broadcast_to(jnp.arange(16), (2, 16))
    batch = {"inputs_BL": ids_BL, "targets_BL": ids_BL, "positions_BL": place_BL, "segments_BL": place_BL * 0 + 1}
    kinds = ValueConfig(rank=0), ValueConfig(rank=2), ValueConfig(rank=2, init="a reward model")

    @jax.jit
    def found():
        params = add_heads(init_params(decoder), config.heads, config)(jax.random.key(0))
        began, params = params, params | {"value_D": jnp.arange(16.0)}
        base = {name: x for name, x in params.items() if name not in config.heads}
        frozen = {"base": base, "value": jax.tree.map(lambda x: x * 2, base)}
        policies = [actor_critic(decoder, 60, 1.0, value)(params, frozen, batch) for value in kinds]
        leaves = params["value"]["layers"]
        moved = params | {"value": {"layers": leaves | {"q_b_NRHK": leaves["q_b_NRHK"] + 1}}}
        x_BLD, _ = decoder.apply({"params": base}, ids_BL, place_BL, place_BL * 0 + 1)
        after = actor_critic(decoder, 60, 1.0, kinds[1])(moved, frozen, batch)[2]
        return began, policies, after, jnp.einsum("BLD,D->BL", x_BLD, params["value_D"], precision="highest")

    began, (shared, base, reward), after, by_hand_BL = found()
    assert not began["value_D"].any() and not began["value"]["layers"]["q_b_NRHK"].any()
    np.testing.assert_allclose(shared[2], by_hand_BL, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(base[2], shared[2], rtol=1e-5, atol=1e-5)  # b is 0: the trunk is its base
    assert np.abs(reward[2] - base[2]).max() > 0.1 and np.abs(after - base[2]).max() > 0.1
    for other in (base, reward):
        np.testing.assert_allclose(other[0], shared[0], rtol=1e-6)


def test_wrong_settings_are_one_line(base, trained, tmp_path, capsys, monkeypatch):
    for more, said in {
        ("--value.rank", "0", "--value.init", "runs/reward"): "value.init='runs/reward': wanted none with value.rank=0",
        ("--lam", "1.5"): "lam=1.5: wanted a number from 0 to 1",
        ("--target-kl", "1", "--beta", "0"): "beta=0.0: wanted above 0 where target_kl is given",
        ("--rollout.minibatches", "3"): "data.batch_size=16: wanted a multiple of",
        ("--model.dropout", "0.1"): "model.dropout=0.1: wanted 0 with gptjax ppo",
    }.items():
        assert said in refused(capsys, *words(base, tmp_path / "run", *more))
    (base.parent / "other_reward.py").write_text(CODE + "\n")
    moved = stopped(trained("ptx"), tmp_path / "moved", 2)
    monkeypatch.chdir(base.parent)
    mesh = ["--mesh.data", "8"]
    for command, said in {
        (*words(base, tmp_path / "run", *mesh, "--ptx.source", "init"),): "'builtin:shakespeare' is no prepared folder",
        (
            *words(base, tmp_path / "run", *mesh, "--value.rank", "2", "--value.init", str(base)),
        ): "which has no score_D; wanted a run by gptjax reward",
        ("ppo", str(moved), *mesh, "--rewards.sources", "other_reward:share"): "is not what this run began with",
    }.items():
        assert main([*command]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_mesh_and_accumulation_change_no_loss(kind, base, tmp_path, highest_precision, monkeypatch):
    curves = {}
    for name, more in {
        "one": ["--mesh.fsdp", "8", "--mesh.data", "1", "--optim.accumulate", "1"],
        "mesh": ["--mesh.fsdp", "4", "--mesh.tensor", "2"],
        "parts": ["--mesh.fsdp", "4", "--mesh.tensor", "2", "--optim.accumulate", "2"],
    }.items():
        given = [*KINDS[kind], "--steps", "10", "--optim.learning-rate", "1e-3"]
        run = tmp_path / name
        monkeypatch.chdir(base.parent)
        assert main(words(base, run, *given, *more)) == 0
        curves[name] = [[x["loss"], x["value_loss"], x["reward"]] for x in lines(run) if "loss" in x]
    for name in ("mesh", "parts"):
        np.testing.assert_allclose(curves[name], curves["one"], rtol=1e-4, atol=1e-5)


LOW = "low_bytes_reward:low"


@pytest.mark.slow
def test_a_bandit_of_one_token_reaches_the_kl_optimum_through_the_whole_stage(base, tmp_path):
    """ref exp(r / beta) / Z for r = 1 on a quarter of the bytes and beta = 0.5, from the weights that were trained."""
    (base.parent / f"{LOW.partition(':')[0]}.py").write_text(
        "def low(answer):\n    return float(len(answer) == 1 and ord(answer) < 64)\n"
    )
    more = ["--rewards.sources", LOW, "--beta", "0.5", "--rollout.max-new-tokens", "1", "--data.batch-size", "256",
            "--steps", "100", "--checkpoint.every", "100", "--evaluate.every", "100", "--optim.accumulate", "1",
            "--optim.ema", "0", "--optim.schedule", "linear", "--optim.final-fraction", "0"]  # fmt: skip
    run = ppo(base, tmp_path / "run", *more)
    tokenizer = BytesTokenizer()
    ids = [tokenizer.prompt_ids(json.loads(line)["prompt"]) for line in open(base.parent / "prompts.jsonl")]
    last_B, length = np.array([len(row) - 1 for row in ids]), max(map(len, ids))
    tokens_BL = np.array([row + [0] * (length - len(row)) for row in ids], np.int32)
    place_BL = np.broadcast_to(np.arange(length), tokens_BL.shape)

    def chances(folder: Path) -> np.ndarray:
        model = load_model(folder, MeshConfig())
        with jax.set_mesh(model.mesh):
            x_BLD, _ = model.decoder.apply({"params": model.params}, tokens_BL, place_BL, place_BL * 0 + 1)
            logits_BV = (x_BLD @ head(model.params).T)[np.arange(len(ids)), last_B, :258]
            return np.asarray(jax.nn.softmax(logits_BV.astype(jnp.float32)))

    reference_BV, found_BV = chances(base), chances(run)
    wanted_BV = reference_BV * np.exp((np.arange(258) < 64) / 0.5)
    wanted_BV /= wanted_BV.sum(1, keepdims=True)
    low = [p_BV[:, :64].sum(1).mean() for p_BV in (reference_BV, wanted_BV, found_BV)]
    assert low[1] > low[0] + 0.3, "the optimum is far from the reference"
    assert abs(low[2] - low[1]) < 0.03
    assert 0.5 * np.abs(found_BV - wanted_BV).sum(1).mean() < 0.06

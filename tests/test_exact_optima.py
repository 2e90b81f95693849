"""The losses of gptjax.align, trained by the real step, reach the optimum that their docstrings name."""

import dataclasses
import json
import sys

import exact_optima
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_optima import GROUPS, Table, optimum, optimum_k3, policy, rollout, total_variation, train

from gptjax.align.losses import policy_loss
from gptjax.align.objectives import kl_estimate
from gptjax.config import MeshConfig, ModelConfig
from gptjax.model.decoder import Decoder, head, init_params
from gptjax.parallel.sharding import make_mesh, on_host
from gptjax.training.losses import token_log_probs

FIVE = Table(np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0, 0.5, 1, -1, 2]), 0.5)


def drawn(seed: int) -> Table:
    """A bandit by chance: 3 to 9 answers, rewards of about 1, beta from 0.2 to 1.5."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 10))
    return Table(rng.dirichlet(np.ones(n)), rng.normal(size=n), float(rng.uniform(0.2, 1.5)))


def sequences(length: int = 3, symbols: int = 4, beta: float = 0.5) -> Table:
    rng = np.random.default_rng(0)
    n = symbols**length
    return Table(rng.dirichlet(np.ones(n)), rng.normal(size=n), beta, length)


def test_closed_forms_are_those_of_the_bandit_whose_numbers_are_known():
    pi = optimum(FIVE)
    np.testing.assert_allclose(pi, [0.07893775, 0.16093129, 0.2187283, 0.00267077, 0.53873189], rtol=2e-6)
    kl = (pi * np.log(pi / FIVE.pi_ref)).sum()
    assert pi @ FIVE.reward - 0.5 * kl == pytest.approx(0.81140249, rel=1e-7)
    reverse = optimum_k3(FIVE)
    assert reverse.sum() == pytest.approx(1)
    # There every answer's derivative r - d/dpi of beta KL(ref || pi) is the same.
    derivative = FIVE.reward + 0.5 * FIVE.pi_ref / reverse
    np.testing.assert_allclose(derivative, derivative[0], rtol=1e-9)
    assert total_variation(pi, reverse) > 0.15
    table = sequences()
    np.testing.assert_allclose(policy(table, {"head_VD": table.head()}), table.pi_ref, rtol=1e-5)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_kl_optimum_is_reached_in_a_hundred_updates(method):
    found = train(FIVE, method)
    assert found["tv"] < 0.02 and found["updates"] <= 100 and found["first"] <= 100
    assert total_variation(np.array(found["policy"]), optimum(FIVE)) == found["tv"]


def test_preferences_drawn_from_a_reward_give_its_optimum_and_the_reward_back():
    assert train(FIVE, "dpo")["tv"] < 0.03
    assert train(FIVE, "reward")["correlation"] > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo-k3", "grpo-k2", "ipo"])
def test_other_estimators_reach_their_own_closed_forms(method):
    found = train(FIVE, method)
    assert found["tv"] < 0.02
    assert total_variation(np.array(found["target"]), optimum(FIVE)) > 0.02, "and these are others than the KL optimum"


@pytest.mark.slow
def test_grpo_as_published_does_not_reach_the_kl_optimum():
    assert train(FIVE, "grpo-published")["tv"] > 0.2
    assert train(FIVE, "grpo-z")["tv"] < 0.02, "z-scores do, with the KL in the reward"


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo"])
def test_the_optimum_is_reached_for_every_beta(method, beta):
    assert train(dataclasses.replace(FIVE, beta=beta), method, seed=1)["tv"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["ppo", "grpo", "grpo-k3", "grpo-k2", "dpo", "reward"])
def test_the_optimum_is_reached_on_bandits_by_chance(method, seed):
    found = train(drawn(seed), method, seed)
    assert found["tv"] < 0.02 and found.get("correlation", 1) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo", "grpo-k3", "grpo-k2", "dpo", "reward"])
def test_a_mesh_of_fsdp_and_tensor_reaches_the_optimum_of_one_device(method):
    one = train(FIVE, method)
    other = train(FIVE, method, mesh_config=MeshConfig(data=1, fsdp=4, tensor=2))
    assert other["tv"] < 0.02
    np.testing.assert_allclose(other["policy"], one["policy"], atol=2e-3)


def objective(table: Table, head_VD: jax.Array) -> jax.Array:
    """E[r] - beta KL(pi || ref) over every answer."""
    batch = {"tokens_BL": jnp.asarray(table.tokens())}
    log_p, log_ref = (
        exact_optima.log_probs(table.symbols, {"head_VD": h}, {}, batch)[0].sum(-1) for h in (head_VD, table.head())
    )
    return (jnp.exp(log_p) * (jnp.asarray(table.reward) - table.beta * (log_p - log_ref))).sum()


def mean_gradient(table: Table, head_VD: jax.Array, method: str, rollouts: int) -> jax.Array:
    """The gradient of a method's loss at a policy, over many rollouts of it."""
    params = {"head_VD": head_VD, "value_D": jnp.zeros(head_VD.shape[1])}
    loss_fn = exact_optima.make_loss(table, method)

    def one(key):
        given = params, table.head(), jnp.float32(table.reward), table.beta, key
        batch = rollout(*given, method=method, symbols=table.symbols, length=table.length)
        return jax.grad(lambda params: loss_fn(params, {}, batch, key)[0])(params)["head_VD"]

    return jax.jit(lambda keys: jax.lax.map(one, keys).mean(0))(jax.random.split(jax.random.key(2), rollouts))


def cosine(a: jax.Array, b: jax.Array) -> float:
    return float((a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum()))


def test_gradients_of_three_token_answers_are_those_of_the_enumerated_objective():
    table = sequences()
    head_VD = jnp.asarray(table.head()) + 0.5 * jax.random.normal(jax.random.key(1), table.head().shape)
    exact = -jax.grad(lambda h: objective(table, h))(head_VD)
    assert cosine(mean_gradient(table, head_VD, "grpo", 100), exact) > 0.99


def test_the_kl_of_each_token_in_the_loss_is_not_that_of_the_answer():
    """A term by k2 has the KL's gradient for answers of one token, and leaves out the later tokens of longer ones."""

    def k2(head_VD):
        p_B, ratio_BL = enumerated(head_VD)
        return (jax.lax.stop_gradient(p_B)[:, None] * kl_estimate(ratio_BL, "k2")).sum()

    def kl(head_VD):
        p_B, ratio_BL = enumerated(head_VD)
        return (p_B[:, None] * ratio_BL).sum()

    def enumerated(head_VD):
        batch = {"tokens_BL": jnp.asarray(table.tokens())}
        log_p_BL, log_ref_BL = (
            exact_optima.log_probs(table.symbols, {"head_VD": h}, {}, batch)[0] for h in (head_VD, table.head())
        )
        return jnp.exp(log_p_BL.sum(-1)), log_p_BL - log_ref_BL

    for length, same in ((1, True), (3, False)):
        table = sequences(length)
        head_VD = jnp.asarray(table.head()) + 0.5 * jax.random.normal(jax.random.key(1), table.head().shape)
        found, wanted = jax.jit(lambda h: (jax.grad(k2)(h), jax.grad(kl)(h)))(head_VD)  # noqa: B023
        assert np.allclose(found, wanted, atol=1e-5) == same


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_three_token_answers_reach_the_enumerated_optimum(method):
    assert train(sequences(), method, updates=400)["tv"] < 0.05


@pytest.mark.parametrize("meshes", [("one",), pytest.param(("one", "mesh"), marks=pytest.mark.slow)])
def test_the_first_update_of_a_decoder_has_ratio_1_and_no_kl(highest_precision, meshes):
    """On one device and on a mesh: the old log-probabilities are those that the training program computes."""
    model = ModelConfig(num_layers=1, width=32, num_heads=4, dtype="float32")
    decoder = Decoder(model, vocab_size=60, context=16, packed=False)
    tokens_BL = jax.random.randint(jax.random.key(3), (8, 17), 0, 60)
    place_BL = jnp.broadcast_to(jnp.arange(16), (8, 16))
    batch = {"inputs_BL": tokens_BL[:, :-1], "targets_BL": tokens_BL[:, 1:]}
    batch["mask_BL"] = ((place_BL >= 5) & (place_BL < 9 + jnp.arange(8)[:, None] % 7)).astype(jnp.float32)

    def log_probs(params, frozen, batch):
        x_BLD, _ = decoder.apply({"params": params}, batch["inputs_BL"], place_BL, jnp.ones_like(place_BL))
        return token_log_probs(x_BLD, head(params), batch["targets_BL"], decoder.vocab_size)

    loss_fn = policy_loss(log_probs, beta=0.1, kl="k3")
    losses = {}
    for name in meshes:
        cfg = MeshConfig(data=1, fsdp=4, tensor=2) if name == "mesh" else MeshConfig(data=1)
        mesh = make_mesh(cfg, jax.devices()[: 8 if name == "mesh" else 1])
        with jax.set_mesh(mesh):
            params = jax.jit(init_params(decoder))(jax.random.key(0))
            old_BL, _ = jax.jit(log_probs)(params, {}, batch)
            more = {"old_log_p_BL": old_BL, "ref_log_p_BL": old_BL, "advantage_BL": batch["mask_BL"] * 0.7}
            step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
            (loss, metrics), grads = step(params, {}, batch | more, jax.random.key(0))
        assert metrics["ratio_max"] == 1 and metrics["clip_fraction"] == 0
        assert metrics["kl"] == 0 and metrics["kl_old"] == 0
        losses[name] = on_host(loss), on_host(grads["embed_VD"])
    for name in meshes:
        np.testing.assert_allclose(losses[name][0], losses["one"][0], rtol=1e-5)
        np.testing.assert_allclose(losses[name][1], losses["one"][1], atol=1e-4 * abs(losses["one"][1]).max())


def test_the_command_reads_instances_and_writes_policies(tmp_path, monkeypatch, capsys):
    given, out = tmp_path / "instances.json", tmp_path / "out.json"
    bandit = {"pi_ref": [0.7, 0.2, 0.1], "reward": [0, 1, 2], "beta": 1.0}
    given.write_text(json.dumps({"name": "more keys", "bandits": [bandit | {"optimum": None}, bandit]}))
    arguments = ["exact_optima.py", "--instances", given, "--method", "grpo", "--json", out]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--updates", "2"])
    exact_optima.main()
    rows = json.loads(out.read_text())["bandits"]
    assert len(rows) == 2 and rows[0]["policy"] == rows[1]["policy"] and sum(rows[0]["policy"]) == pytest.approx(1)
    assert rows[0]["updates"] == 2 and 0 < rows[0]["tv"] < 1
    given.write_text(json.dumps({"bandits": [bandit | {"pi_ref": [0.7, 0.2, 0.2]}]}))
    with pytest.raises(SystemExit, match="2"):
        exact_optima.main()
    assert "bandits[0]: wanted a pi_ref of probabilities" in capsys.readouterr().err


def test_every_group_estimator_names_its_fixed_point():
    for name, estimator in GROUPS.items():
        assert ("not the KL optimum" in estimator.fixed_point) == (name == "grpo-published")
        assert ("lambda" in estimator.fixed_point) == (name == "grpo-k3")

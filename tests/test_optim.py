"""Schedules by their formulas; each optimizer by hand, by letters, and the same on every mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import MeshConfig, ModelConfig, OptimConfig
from gptjax.model.decoder import Decoder, dims, init_params
from gptjax.parallel.sharding import make_mesh, matrix, shardings, suffix, to_global
from gptjax.training.optim import decay_mask, make_optimizer, make_schedule, orthogonalise, scale_by_factored_rms

KINDS = ("adamw", "lion", "adafactor", "muon")
GPT2 = ModelConfig(num_layers=2, width=16, num_heads=4)
LLAMA = ModelConfig(num_layers=2, width=16, num_heads=4, queries_per_kv=2, mlp_ratio=2, positions="rope",
                    norm="rmsnorm", activation="swiglu", biases=False, tied=False, qk_norm=True)  # fmt: skip


def rates(steps: int = 100, **settings) -> np.ndarray:
    schedule = make_schedule(OptimConfig(**{"learning_rate": 1.0, "warmup_steps": 10} | settings), steps)
    return np.array([schedule(jnp.int32(u)) for u in range(steps + 5)])


def shapes(cfg: ModelConfig):
    return jax.eval_shape(init_params(Decoder(cfg, 64, 8)), jax.random.key(0))


def randoms(tree, seed: int):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def constant(rate: float):
    return lambda u: jnp.float32(rate)


def first_updates(params, grads, **settings):
    """The updates of one step at learning rate 1, without clipping."""
    tx = make_optimizer(OptimConfig(**{"clip_norm": 0.0, "weight_decay": 0.0} | settings), constant(1.0))
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)


# Schedules.


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant", "rsqrt"])
def test_every_schedule_warms_up_in_a_straight_line(kind):
    np.testing.assert_allclose(rates(schedule=kind)[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates(5, schedule=kind)[:5], np.arange(1, 6) / 10, rtol=1e-6)  # a shorter run's is cut


@pytest.mark.parametrize(
    ("settings", "first", "wanted"),
    [
        ({"schedule": "wsd", "decay_fraction": 0.25, "final_fraction": 0.0}, 75, np.linspace(1, 0, 26)),
        ({"schedule": "linear", "final_fraction": 0.2}, 10, np.linspace(1, 0.2, 91)),
        ({"schedule": "constant"}, 100, [1.0]),
        ({"schedule": "cosine", "final_fraction": 0.1}, 10, 0.1 + 0.45 * (1 + np.cos(np.linspace(0, np.pi, 91)))),
    ],
    ids=["wsd", "linear", "constant", "cosine"],
)
def test_schedules_are_constant_fall_by_their_formula_and_stay(settings, first, wanted):
    r = rates(**settings)
    np.testing.assert_allclose(r[9:first], 1.0, rtol=1e-5)
    np.testing.assert_allclose(r[first:101], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(r[100:], wanted[-1], rtol=1e-5, atol=1e-6)


def test_rsqrt_halves_when_the_updates_are_four_times_the_warm_up():
    r = rates(schedule="rsqrt", learning_rate=3.0)
    np.testing.assert_allclose(r[9:], 3.0 * np.sqrt(10 / np.arange(10, 106)), rtol=1e-5)
    np.testing.assert_allclose(r[39], 1.5, rtol=1e-5)
    assert rates(schedule="rsqrt", warmup_steps=0)[3] == 0.5


# Letters.


def test_matrices_have_two_sides_and_stacks_and_heads_are_none():
    sides = {"q_NDHK": ("D", "HK"), "o_NHKD": ("HK", "D"), "embed_VD": ("V", "D"), "position_TD": ("T", "D")}
    sides |= {"w_in_NEDF": ("D", "F"), "router_NDE": ("D", "E"), "q_a_NDR": ("D", "R"), "q_b_NRHK": ("R", "HK")}
    assert {name: matrix(name) for name in sides} == sides
    vectors = ("norm_attn_ND", "q_bias_NHK", "k_bias_NGK", "w_in_bias_NF", "norm_q_NK", "norm_final_D", "score_D", "w")
    assert [matrix(name) for name in vectors] == [None] * len(vectors)


@pytest.mark.parametrize("cfg", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_matrices_decay_and_norms_biases_and_positions_do_not(cfg):
    mask = decay_mask(shapes(cfg))
    decaying = {n for n, d in mask["layers"].items() if d} | {n for n, d in mask.items() if d is True}
    wanted = {"embed_VD", "q_NDHK", "k_NDGK", "v_NDGK", "o_NHKD", "w_in_NDF", "w_out_NFD"}
    assert decaying == wanted | ({"head_VD", "w_gate_NDF"} if cfg is LLAMA else set())


@pytest.mark.parametrize("kind", KINDS)
def test_with_no_gradient_every_kind_decays_the_matrices_and_nothing_else(kind):
    params = {"embed_VD": jnp.ones((4, 2)), "position_TD": jnp.ones((4, 2)), "norm_D": jnp.ones(2),
              "layers": {"q_NDHK": jnp.ones((1, 2, 2, 1)), "norm_ND": jnp.ones((1, 2))}}  # fmt: skip
    updates = first_updates(params, jax.tree.map(jnp.zeros_like, params), kind=kind, weight_decay=0.5)
    moved = {p[-1].key: float(u.mean()) for p, u in jax.tree_util.tree_leaves_with_path(updates)}
    assert moved == {"embed_VD": -0.5, "q_NDHK": -0.5, "position_TD": 0, "norm_D": 0, "norm_ND": 0}


@pytest.mark.parametrize("cfg", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_name_in_the_state_states_the_true_shape(kind, cfg):
    size, params = dims(cfg, 64, 8), shapes(cfg)
    state = jax.eval_shape(make_optimizer(OptimConfig(kind=kind), constant(0.1)).init, params)
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = getattr(path[-1], "key", "")
        assert x.shape == tuple(size[c] for c in suffix(name)), jax.tree_util.keystr(path)


# Directions.


def test_adamw_is_optaxs_to_the_bit_and_has_its_state():
    cfg = OptimConfig(weight_decay=0.5)
    params = randoms({"embed_VD": jnp.zeros((4, 2)), "layers": {"q_bias_NHK": jnp.zeros((2, 2, 1))}}, 0)
    ours = make_optimizer(cfg, constant(0.1))
    adamw = optax.adamw(constant(0.1), cfg.beta1, cfg.beta2, cfg.epsilon, weight_decay=0.5, mask=decay_mask)
    theirs = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)
    a, b = ours.init(params), theirs.init(params)
    assert jax.tree.structure(a) == jax.tree.structure(b), "checkpoints name their leaves by this structure"
    for seed in (1, 2):
        (u, a), (v, b) = (tx.update(randoms(params, seed), s, params) for tx, s in ((ours, a), (theirs, b)))
        jax.tree.map(np.testing.assert_array_equal, u, v)


def test_lions_update_is_the_sign_of_its_mixed_momentum():
    tx = make_optimizer(OptimConfig(kind="lion", weight_decay=0, clip_norm=0, beta1=0.5, beta2=0.9), constant(0.1))
    params = {"w_DF": jnp.zeros((1, 2))}
    state = tx.init(params)
    for g, wanted in (([4.0, -4.0], [-0.1, 0.1]), ([-0.3, 0.5], [-0.1, -0.1]), ([-3.0, 0.1], [0.1, 0.1])):
        # The momentum is 0, then (0.4, -0.4), then (0.33, -0.31); halved and added to half of the gradient.
        updates, state = tx.update({"w_DF": jnp.array([g])}, state, params)
        np.testing.assert_allclose(updates["w_DF"], [wanted], rtol=1e-6)


def test_adafactor_is_the_papers_formula_for_each_layers_matrix():
    """Row and column means in NumPy for q_NDHK as N matrices D x HK, and for o_NHKD as HK x D, over two updates."""
    tx = scale_by_factored_rms(beta2=0.9, epsilon=1e-8)
    shape = {"q_NDHK": (2, 6, 2, 3), "o_NHKD": (2, 2, 3, 6)}
    state = tx.init({name: jnp.zeros(s) for name, s in shape.items()})
    assert {n: x.shape for part in state[1:] for n, x in part.items()} == {
        "q_ND": (2, 6), "q_NHK": (2, 2, 3), "o_NHK": (2, 2, 3), "o_ND": (2, 6),
    }  # fmt: skip
    r = c = {name: 0.0 for name in shape}
    for t in (1, 2):
        rng, decay = np.random.default_rng(t), min(0.9, 1 - t**-0.8)
        g = {name: rng.normal(size=s).astype(np.float32) for name, s in shape.items()}
        flat = {name: x.reshape(2, 6, 6) for name, x in g.items()}
        r = {n: decay * r[n] + (1 - decay) * (x**2).mean(2, keepdims=True) for n, x in flat.items()}
        c = {n: decay * c[n] + (1 - decay) * (x**2).mean(1, keepdims=True) for n, x in flat.items()}
        wanted = {n: x / np.sqrt(r[n] * c[n] / r[n].mean(1, keepdims=True)) for n, x in flat.items()}
        wanted = {n: u / np.maximum(1, np.sqrt((u**2).mean((1, 2), keepdims=True))) for n, u in wanted.items()}
        updates, state = tx.update(jax.tree.map(jnp.asarray, g), state)
        for name, u in updates.items():
            np.testing.assert_allclose(u, wanted[name].reshape(u.shape), rtol=1e-4)


def test_adafactor_keeps_a_first_moment_only_where_beta1_asks_for_one():
    params = shapes(LLAMA)

    def numbers(beta1):
        tx = make_optimizer(OptimConfig(kind="adafactor", beta1=beta1), constant(0.1))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))

    whole = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert numbers(0.0) < 0.2 * whole
    assert numbers(0.9) == numbers(0.0) + whole + 1  # and its own count


def test_newton_schulz_gives_the_orthogonal_factor_of_any_shape():
    for shape in ((8, 8), (6, 20), (20, 6)):
        x = jax.random.normal(jax.random.key(0), shape)
        u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
        turned = u.T @ np.asarray(orthogonalise(x)) @ vt.T
        assert (0.65 < np.diag(turned)).all() and (np.diag(turned) < 1.25).all()
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-4)
        np.testing.assert_allclose(orthogonalise(x.T), orthogonalise(x).T, atol=1e-5)


def test_muon_turns_the_layers_matrices_and_adam_all_others():
    params = randoms(shapes(LLAMA), 0)
    grads = randoms(params, 1)
    muon, adam = (first_updates(params, grads, kind=kind) for kind in ("muon", "adamw"))
    flat = {p[-1].key: (m, a) for (p, m), a in zip(jax.tree_util.tree_leaves_with_path(muon), jax.tree.leaves(adam))}
    turned = {n for n, (m, a) in flat.items() if not np.array_equal(m, a)}
    assert turned == {"q_NDHK", "k_NDGK", "v_NDGK", "o_NHKD", "w_in_NDF", "w_gate_NDF", "w_out_NFD"}
    for name in turned:
        side = int(np.prod([dims(LLAMA, 64, 8)[c] for c in matrix(name)[0]]))
        x = np.asarray(flat[name][0]).reshape(2, side, -1)
        size = np.linalg.svd(x, compute_uv=False) / (0.2 * max(x.shape[1:]) ** 0.5)
        assert (0.6 < size).all() and (size < 1.25).all(), name


def test_muon_orthogonalises_each_layer_by_itself_and_looks_ahead():
    params = {"w_NDF": jnp.zeros((2, 4, 8))}
    g = randoms(params, 0)["w_NDF"]
    tx = make_optimizer(OptimConfig(kind="muon", momentum=0.5, clip_norm=0, weight_decay=0), constant(1.0))
    one, state = tx.update({"w_NDF": g}, tx.init(params), params)
    other, _ = tx.update({"w_NDF": g.at[1].multiply(-3)}, tx.init(params), params)
    np.testing.assert_allclose(one["w_NDF"][0], other["w_NDF"][0], atol=1e-6)
    np.testing.assert_allclose(one["w_NDF"][1], -other["w_NDF"][1], atol=1e-5)
    h = randoms(params, 1)["w_NDF"]
    two, _ = tx.update({"w_NDF": h}, state, params)
    # Nesterov: momentum m = g / 2 + h, and m / 2 + h is what is orthogonalised.
    np.testing.assert_allclose(two["w_NDF"], -0.2 * 8**0.5 * orthogonalise((g / 2 + h) / 2 + h), atol=1e-5)


# Meshes.


def closed_form(kind: str, cfg: ModelConfig) -> int:
    """Bytes a device of the state on fsdp=4 x tensor=2: a matrix in 8 parts (embedding and head too), a vector whole.

    Factors: what is left of D alone, of F, V or T alone, is a vector; the heads of a layer lie on `tensor`.
    """
    n = dims(cfg, 64, 8)
    matrices = {k: math.prod(n[c] for c in k) for k in ("VD", "NDHK", "NDGK", "NDF")}
    count = {"VD": 2, "NDHK": 2, "NDGK": 2, "NDF": 3}
    hidden = sum(matrices[k] * count[k] for k in count if k != "VD") // 8
    table = 2 * matrices["VD"] // 8
    vectors = 2 * n["N"] * n["D"] + 2 * n["N"] * n["K"] + n["D"]  # two norms, two of heads, and the last
    numbers = hidden + table + vectors
    scalars = {"adamw": 2, "lion": 2, "adafactor": 3, "muon": 2}[kind]  # counts of the direction and of the schedule
    if kind == "adamw":
        numbers *= 2
    if kind == "muon":
        numbers += table + vectors
    if kind == "adafactor":
        factors = 2 * (n["V"] + n["D"]) + n["N"] * (7 * n["D"] + 3 * n["F"])
        factors += 2 * n["N"] * (n["H"] + n["G"]) // 2 * n["K"]
        numbers += factors + vectors
    return 4 * (numbers + scalars)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_mesh_the_state_is_divided_and_the_updates_are_the_same(kind):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    tx = make_optimizer(OptimConfig(kind=kind), constant(0.1))
    params, grads = randoms(shapes(LLAMA), 0), randoms(shapes(LLAMA), 1)

    def two_updates(params, grads):
        state = tx.init(params)
        for g in (grads, jax.tree.map(lambda x: x**2, grads)):
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    wanted = jax.jit(two_updates)(params, grads)
    where = shardings(jax.eval_shape(two_updates, params, grads), mesh)
    with jax.set_mesh(mesh):
        host = jax.device_get((params, grads))
        found = jax.jit(two_updates, out_shardings=where)(*(to_global(tree, mesh) for tree in host))
    largest = functools.partial(jax.tree.map, lambda a, b: float(np.abs(a - b).max()))
    assert max(jax.tree.leaves(largest(jax.device_get(found[0]), jax.device_get(wanted[0])))) < 1e-5
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(found[1]))
    assert held == closed_form(kind, LLAMA)

"""Laws of the step and the loop, on a model of one matrix: training/ knows no decoder."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import MeshConfig
from gptjax.config.section import InputError
from gptjax.parallel.sharding import make_mesh
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.training.loop import Diverged, Hooks, fit
from gptjax.training.step import (
    Beside,
    compile_step,
    epoch_order,
    init_state,
    make_init,
    make_train_step,
    several_updates,
)
from gptjax.training.stop import Interrupted


def loss_fn(params, frozen, batch, key):
    """Weighted mean squared error of a linear model around a frozen offset."""
    error_B = batch["x_BD"] @ params["w_D"] + frozen["offset"] - batch["y_B"]
    weight = batch["weight_B"].sum()
    loss = (error_B**2 * batch["weight_B"]).sum() / jnp.maximum(weight, 1e-9)
    return loss, {"loss": loss, "weight": weight, "noise": jax.random.normal(key)}


def batch(step: int, rows: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    return {"x_BD": x, "y_B": x.sum(axis=1), "weight_B": rng.uniform(0, 2, rows).astype(np.float32)}


def make(accumulate: int = 1, rate: float = 0.05, **ema: float):
    tx = optax.adamw(rate)
    mesh = make_mesh(MeshConfig())
    init = make_init(lambda key: {"w_D": jax.random.normal(key, (4,))}, tx, **ema)
    step = make_train_step(loss_fn, tx, lambda u: rate, accumulate, **ema)
    state = init_state(init, 0, mesh)
    return mesh, state, compile_step(step, mesh, state, {"offset": jnp.zeros(())}, batch(0))


FROZEN = {"offset": jnp.float32(0.0)}


def endless(start: int = 0):
    while True:
        yield batch(start), {"step": start + 1}
        start += 1


def run(until: int, mesh, state, step, batches=None, **hooks):
    """The last state, the metrics of each step, and (step, state.step, state of the data) of each save."""
    logged, saved = {}, []
    hooks = {
        "log": lambda i, metrics, data: logged.update({i: metrics}),
        "save": lambda i, state, data: saved.append((i, int(state.step), data)),
    } | hooks
    with jax.set_mesh(mesh):
        batches = batches or endless(int(state.step))
        state = fit(step, state, FROZEN, batches, until, mesh=mesh, hooks=Hooks(**hooks))
    return state, logged, saved


def test_training_lowers_the_loss_and_logs_every_step_once_in_order():
    state, logged, saved = run(60, *make())
    assert list(logged) == list(range(1, 61)) and int(state.step) == int(state.updates) == 60
    assert logged[60]["loss"] < 0.2 * logged[1]["loss"]
    assert saved == [(60, 60, {"step": 60})]
    assert set(logged[1]) == {"loss", "weight", "noise", "grad_norm", "learning_rate", "updates", "input_seconds"}


def test_steps_asked_for_are_saved_besides_the_regular_ones():
    assert [i for i, *_ in run(10, *make(), save_every=4, save_at=(3, 7, 11))[2]] == [3, 4, 7, 8, 10]


def test_accumulation_weights_micro_batches_by_their_tokens():
    """Weights differ from row to row, so an unweighted mean over micro-batches would show."""
    (_, whole, _), (_, parts, _) = run(10, *make()), run(10, *make(accumulate=2))
    np.testing.assert_allclose([m["loss"] for m in whole.values()], [m["loss"] for m in parts.values()], rtol=1e-5)
    np.testing.assert_allclose([m["weight"] for m in whole.values()], [m["weight"] for m in parts.values()], rtol=1e-6)


def test_several_updates_are_one_step_and_those_that_steps_on_parts_make_shuffled_in_each_epoch():
    tx = optax.adamw(0.05)
    step = make_train_step(loss_fn, tx, lambda update: jnp.asarray(0.05 + update))
    state = make_init(lambda key: {"w_D": jax.random.normal(key, (4,))}, tx)(0)
    orders = [np.asarray(epoch_order(state, epoch, 18)) for epoch in range(3)]
    assert orders[0].tolist() == list(range(18)) == sorted(orders[1]) == sorted(orders[2])
    at_another_step = epoch_order(state.replace(step=state.step + 1), 1, 18)
    assert len({tuple(order.tolist()) for order in (*orders, np.asarray(at_another_step))}) == 4
    one, losses = state, []
    for i in range(9):  # three passes over three parts
        rows = orders[i // 3][i % 3 :: 3]
        one, metrics = jax.jit(step)(one, FROZEN, {name: x[rows] for name, x in batch(0, 18).items()})
        losses.append(float(metrics["loss"]))
    several, metrics = jax.jit(several_updates(step, 3, 3))(state, FROZEN, batch(0, 18))
    np.testing.assert_allclose(several.params["w_D"], one.params["w_D"], rtol=1e-6)
    assert (several.step, several.updates, metrics["updates"], metrics["learning_rate"]) == (1, 9, 9, jnp.float32(8.05))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_of_a_loss_beside_is_added_by_its_own_weights(accumulate):
    def other(params, frozen, batch, key):
        return loss_fn({"w_D": params["w_D"] * 2}, frozen, batch, key)

    other_batch = batch(1, 8)
    own, theirs = (
        jax.grad(lambda p: f(p, FROZEN, b, jax.random.key(0))[0])({"w_D": jnp.ones(4)})["w_D"]  # noqa: B023
        for f, b in ((loss_fn, batch(0)), (other, other_batch))
    )
    tx = optax.sgd(1.0)
    step = make_train_step(loss_fn, tx, jnp.float32, accumulate, beside=Beside("text", 3.0, other))
    state = make_init(lambda key: {"w_D": jnp.ones(4)}, tx)(0)
    new, metrics = jax.jit(step)(state, FROZEN, batch(0) | {f"text_{n}": x for n, x in other_batch.items()})
    np.testing.assert_allclose(1 - new.params["w_D"], own + 3 * theirs, rtol=1e-5)
    alone = loss_fn({"w_D": jnp.ones(4)}, FROZEN, batch(0), jax.random.key(0))[0]
    np.testing.assert_allclose(metrics["loss"], alone + 3 * metrics["text_loss"], rtol=1e-5)
    assert metrics["weight"] == pytest.approx(batch(0)["weight_B"].sum())


def test_every_step_draws_other_random_numbers_and_a_rerun_the_same():
    (_, a, _), (_, b, _) = run(5, *make()), run(5, *make())
    assert len({float(m["noise"]) for m in a.values()}) == 5
    assert [float(m["noise"]) for m in a.values()] == [float(m["noise"]) for m in b.values()]


def test_a_step_is_logged_before_it_is_saved_and_saved_before_it_is_evaluated():
    events = []
    run(4, *make(), log=lambda i, m, d: events.append(("log", i, d["step"])),
        save=lambda i, s, d: events.append(("save", i)), save_every=2,
        evaluate=lambda i, s: events.append(("evaluate", i)), evaluate_every=2)  # fmt: skip
    assert events == [
        ("log", 1, 1), ("log", 2, 2), ("save", 2), ("evaluate", 2),
        ("log", 3, 3), ("log", 4, 4), ("save", 4), ("evaluate", 4),
    ]  # fmt: skip


def test_a_request_to_stop_saves_the_step_just_done_and_raises():
    saved = []
    with pytest.raises(Interrupted):
        run(50, *make(), save=lambda i, s, d: saved.append((i, d)), stop=lambda: True)
    assert saved == [(1, {"step": 1})]


def test_the_next_batch_and_no_more_is_on_its_way_while_a_step_runs_and_what_is_saved_is_what_was_trained():
    asked, seen = [], []

    def counted():
        for made in endless():
            asked.append(made[1]["step"])
            yield made

    def save(i, state, data):
        until = time.monotonic() + 5
        while len(asked) < min(i + 1, 4) and time.monotonic() < until:
            time.sleep(0.001)
        seen.append((i, data["step"], asked[-1]))

    run(4, *make(), counted(), save=save, save_every=1)
    assert seen == [(1, 1, 2), (2, 2, 3), (3, 3, 4), (4, 4, 4)]


def test_batches_of_a_function_are_made_from_the_state_after_the_last_update():
    seen = []

    def on_policy(state):
        seen.append((int(state.step), jax.device_get(state.params["w_D"])))
        return batch(int(state.step)), {"step": int(state.step) + 1}

    saved: dict[int, tuple] = {}
    save = lambda i, s, d: saved.update({i: (jax.device_get(s.params["w_D"]), d)})  # noqa: E731
    run(4, *make(), on_policy, save=save, save_every=1)
    assert [at for at, _ in seen] == [0, 1, 2, 3], "asked for once a step, and not ahead"
    for i in range(1, 4):
        np.testing.assert_array_equal(seen[i][1], saved[i][0])
    assert [data["step"] for _, data in saved.values()] == [1, 2, 3, 4]
    last = run(4, *make())[0]
    np.testing.assert_array_equal(saved[4][0], jax.device_get(last.params["w_D"]))  # the same batches ahead of time


def test_a_batch_that_can_not_be_made_ends_training_in_its_place():
    saved = []

    def three():
        yield from itertools.islice(endless(), 3)
        raise InputError("page 7 is damaged")

    with pytest.raises(InputError, match="page 7"):
        run(9, *make(), three(), save=lambda i, s, d: saved.append((i, d["step"])), save_every=1)
    assert saved == [(1, 1), (2, 2), (3, 3)]


def test_a_step_states_how_long_it_waited_for_its_batch():
    def slow_third():
        for made in endless():
            time.sleep(0.3 if made[1]["step"] == 3 else 0.0)
            yield made

    _, logged, _ = run(4, *make(), slow_third())
    assert logged[3]["input_seconds"] > 0.1 > logged[4]["input_seconds"]


def test_a_loss_that_is_no_number_ends_training_before_it_is_saved():
    saved, logged = [], []
    with pytest.raises(Diverged, match="(loss|grad_norm) is (nan|inf) at step"):
        run(50, *make(rate=1e30), log=lambda i, m, d: logged.append((m["loss"], m["grad_norm"])),
            save=lambda i, s, d: saved.append(float(jnp.abs(s.params["w_D"]).max())), save_every=1)  # fmt: skip
    assert len(saved) < 10
    assert np.isfinite(logged[:-1]).all() and not np.isfinite(logged[-1]).all()


@pytest.fixture
def traces(monkeypatch):
    """The starts and ends of profiles, none of which is made."""
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize("steps", [(2, 3), (1, 9), (9, 9)])
def test_a_run_that_starts_or_ends_within_the_steps_to_trace_traces_its_own(tmp_path, steps, traces):
    mesh, state, step = make()
    state, *_ = run(2, mesh, state, step)
    run(4, mesh, state, step, trace=(*steps, tmp_path))
    assert traces == ([] if steps == (9, 9) else ["start", "stop"])


def test_a_run_that_is_interrupted_within_the_steps_to_trace_keeps_what_was_traced(tmp_path, traces):
    with pytest.raises(Interrupted):
        run(9, *make(), trace=(1, 5, tmp_path), stop=lambda: bool(traces))
    assert traces == ["start", "stop"]


def test_training_refuses_sharded_state_without_a_mesh():
    mesh, state, step = make()
    with pytest.raises(InputError, match="no mesh is set"):
        fit(step, state, FROZEN, endless(), 1, mesh=mesh, hooks=Hooks())


def test_averages_begin_as_the_parameters_and_follow_them_by_their_decay():
    mesh, state, step = make(ema=0.75)
    np.testing.assert_array_equal(state.ema["w_D"], state.params["w_D"])
    wanted, seen = np.asarray(state.params["w_D"], np.float64), []

    def save(i, state, data):
        seen.append(jax.device_get((state.params["w_D"], state.ema["w_D"])))

    run(5, mesh, state, step, save=save, save_every=1)
    for params, average in seen:
        wanted = 0.75 * wanted + 0.25 * params
        np.testing.assert_allclose(average, wanted, rtol=1e-5)
    assert not np.allclose(wanted, params)
    plain = run(5, *make())[0]
    np.testing.assert_array_equal(params, plain.params["w_D"])  # training is the same without them
    assert plain.ema == {}


def test_averages_are_float32_and_lie_where_the_parameters_do():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    init = make_init(lambda key: {"w_DF": jnp.ones((8, 4), jnp.bfloat16)}, optax.sgd(0.1), ema=0.9)
    state = init_state(init, 0, mesh)
    assert state.ema["w_DF"].dtype == jnp.float32 and state.params["w_DF"].dtype == jnp.bfloat16
    assert state.ema["w_DF"].sharding == state.params["w_DF"].sharding
    assert state.ema["w_DF"].addressable_shards[0].data.shape == (2, 2)


def test_a_compile_cache_that_others_can_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "gptjax" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(InputError, match="can be written by others"):
        enable_compile_cache()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="compiled can't be made .*; set XDG_CACHE_HOME, or --no-compile-cache"):
        enable_compile_cache()

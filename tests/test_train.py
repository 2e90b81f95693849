"""Laws of the step and the loop, on a model of one matrix: train.py knows no decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import MeshConfig
from gptjax.settings import InputError
from gptjax.sharding import make_mesh
from gptjax.train import (
    Diverged,
    Interrupted,
    compile_step,
    enable_compile_cache,
    fit,
    init_state,
    make_init,
    make_train_step,
)


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


def make(accumulate: int = 1, rate: float = 0.05):
    tx = optax.adamw(rate)
    mesh = make_mesh(MeshConfig())
    init = make_init(lambda key: {"w_D": jax.random.normal(key, (4,))}, tx)
    step = make_train_step(loss_fn, tx, lambda u: rate, accumulate)
    state = init_state(init, 0, mesh)
    return mesh, state, compile_step(step, mesh, state, {"offset": jnp.zeros(())}, batch(0))


FROZEN = {"offset": jnp.float32(0.0)}


def endless(start: int = 0):
    while True:
        yield batch(start), {"step": start + 1}
        start += 1


def run(until: int, mesh, state, step, **more):
    logged, saved = {}, []
    more = {"save_every": 1000, "save": lambda i, state, data: saved.append((i, int(state.step), data))} | more
    with jax.set_mesh(mesh):
        state = fit(step, state, FROZEN, endless(int(state.step)), until, mesh=mesh, log=logged.__setitem__, **more)
    return state, logged, saved


def test_training_lowers_the_loss_and_logs_every_step_once_in_order():
    state, logged, saved = run(60, *make())
    assert list(logged) == list(range(1, 61)) and int(state.step) == int(state.updates) == 60
    assert logged[60]["loss"] < 0.2 * logged[1]["loss"]
    assert saved == [(60, 60, {"step": 60})]
    assert set(logged[1]) == {"loss", "weight", "noise", "grad_norm", "learning_rate", "updates"}


@pytest.mark.parametrize("accumulate", [2])
def test_accumulation_weights_micro_batches_by_their_tokens(accumulate):
    """Weights differ from row to row, so an unweighted mean over micro-batches would show."""
    (_, whole, _), (_, parts, _) = run(10, *make()), run(10, *make(accumulate))
    np.testing.assert_allclose([m["loss"] for m in whole.values()], [m["loss"] for m in parts.values()], rtol=1e-5)
    np.testing.assert_allclose([m["weight"] for m in whole.values()], [m["weight"] for m in parts.values()], rtol=1e-6)


def test_every_step_draws_other_random_numbers_and_a_rerun_the_same():
    (_, a, _), (_, b, _) = run(5, *make()), run(5, *make())
    assert len({float(m["noise"]) for m in a.values()}) == 5
    assert [float(m["noise"]) for m in a.values()] == [float(m["noise"]) for m in b.values()]


def test_a_step_is_logged_before_it_is_saved_and_saved_before_a_hook():
    events = []
    mesh, state, step = make()
    with jax.set_mesh(mesh):
        fit(
            step, state, FROZEN, endless(), 4, mesh=mesh, log=lambda i, m: events.append(("log", i)),
            save=lambda i, s, d: events.append(("save", i)), save_every=2,
            hooks={lambda i, s: events.append(("evaluate", i)): 2},
        )  # fmt: skip
    wanted = [
        ("log", 1),
        ("log", 2),
        ("save", 2),
        ("evaluate", 2),
        ("log", 3),
        ("log", 4),
        ("save", 4),
        ("evaluate", 4),
    ]
    assert events == wanted


def test_a_request_to_stop_saves_the_step_just_done_and_raises():
    saved, mesh, state, step = [], *make()
    with jax.set_mesh(mesh), pytest.raises(Interrupted):
        fit(
            step, state, FROZEN, endless(), 50, mesh=mesh, log=lambda i, m: None,
            save=lambda i, s, d: saved.append((i, d)), save_every=1000, stop=lambda: True,
        )  # fmt: skip
    assert saved == [(1, {"step": 1})]


def test_a_loss_that_is_no_number_ends_training_before_it_is_saved():
    saved, (mesh, state, step) = [], make(rate=1e30)
    with jax.set_mesh(mesh), pytest.raises(Diverged, match="(loss|grad_norm) is (nan|inf) at step"):
        fit(
            step, state, FROZEN, endless(), 50, mesh=mesh, log=lambda i, m: None,
            save=lambda i, s, d: saved.append(float(jnp.abs(s.params["w_D"]).max())), save_every=1,
        )  # fmt: skip
    assert len(saved) < 10


def test_training_refuses_sharded_state_without_a_mesh():
    mesh, state, step = make()
    with pytest.raises(InputError, match="no mesh is set"):
        fit(step, state, FROZEN, endless(), 1, mesh=mesh, log=print, save=print, save_every=1)


def test_a_compile_cache_that_others_can_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "gptjax" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(InputError, match="can be written by others"):
        enable_compile_cache()

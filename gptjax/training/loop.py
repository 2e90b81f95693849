"""The training loop of every stage: knows no model, only a loss function, an optimizer and an iterator of batches."""

import contextlib
import math
import os
import signal
import stat
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gptjax.config.section import InputError
from gptjax.parallel.sharding import LocalRows, constrain, require_mesh, shardings, suffix, to_global
from gptjax.runtime.versions import cache_folder

T = TypeVar("T")

# loss_fn(params, frozen, batch, key) -> (loss, metrics). The loss is a weighted mean over the batch, and
# metrics["weight"] is the sum of its weights (tokens, pairs): it is what micro-batches and rows are averaged by.
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to continue, as a plain tree that a checkpoint stores as it is."""

    step: jax.Array  # batches seen
    updates: jax.Array  # updates made; the schedule's clock
    params: Any
    opt_state: Any
    key_W: jax.Array  # raw uint32 words, so that checkpoints and digests need no special case
    ema: Any = flax.struct.field(default_factory=dict)  # float32 averages of params; {} where none are kept


class Interrupted(Exception):
    """The run was asked to stop; its state is saved and the same command goes on."""


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number; nothing is saved from that step on."""


def make_init(init_params: Callable[[jax.Array], Any], tx: optax.GradientTransformation, ema: float = 0.0) -> Callable:
    """Builds init(seed) -> TrainState, to be traced, so that each device makes only its own part.

    With a decay `ema` above 0 the state also holds averages of the parameters, which begin as the parameters.
    """

    def init(seed: jax.Array) -> TrainState:
        key_params, key_state = jax.random.split(jax.random.key(seed))
        params = init_params(key_params)
        zero = jnp.zeros((), jnp.int32)
        averages = _float32(params) if ema else {}
        return TrainState(zero, zero, params, tx.init(params), jax.random.key_data(key_state), averages)

    return init


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def init_state(init: Callable, seed: int, mesh: Mesh) -> TrainState:
    """The initial state, made already sharded; the same numbers on every mesh."""
    where = shardings(jax.eval_shape(init, 0), mesh)
    return jax.jit(init, out_shardings=where)(seed)


def run_in_background(make: Callable[[], T], mesh: Mesh) -> Future[T]:
    """Calls make() in a thread under the mesh, e.g. to compile while text is prepared: XLA works without Python's lock.

    The process does not end before the thread does.
    """

    def under_mesh() -> T:
        with jax.set_mesh(mesh):
            return make()

    thread = ThreadPoolExecutor(1, "background")
    made = thread.submit(under_mesh)
    thread.shutdown(wait=False)
    return made


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.typing.ArrayLike], jax.Array],
    accumulate: int = 1,
    ema: float = 0.0,
    norms: bool = False,
) -> Callable:
    """Builds step(state, frozen, batch) -> (state, metrics); with `norms` the metrics hold grad_norm_N too, by layer.

    With accumulate > 1 the rows are cut into that many micro-batches, run one after the other, and their gradients
    averaged by weight, so that the result is that of the whole batch whatever the padding.

    With a decay `ema` above 0, state.ema becomes ema state.ema + (1 - ema) params after each update: an average over
    about the last 1 / (1 - ema) updates, in which the initial parameters still weigh ema^updates. That is its only
    bias, and it is small once the run is several times longer than the average.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(params, frozen, batch, key):
        if accumulate == 1:
            (_, metrics), grads = value_and_grad(params, frozen, batch, key)
            return grads, metrics
        parts = {name: _micro_batches(x, suffix(name), accumulate) for name, x in batch.items()}

        def add(total, i_and_part):
            i, part = i_and_part
            part = {name: constrain(x, suffix(name)) for name, x in part.items()}
            (_, metrics), grads = value_and_grad(params, frozen, part, jax.random.fold_in(key, i))
            values = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**metrics, "weight": 1.0})
            weighted = jax.tree.map(lambda x: x * metrics["weight"], (grads, values))
            return jax.tree.map(jnp.add, total, weighted), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(value_and_grad, params, frozen, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1])
        zeros = zeros, jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes[0][1])
        (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
        weight = metrics["weight"]
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-30), (grads, metrics))
        return grads, {**metrics, "weight": weight}

    def train_step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key_W), state.step)
        grads, metrics = gradients(state.params, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.updates)}
        if norms:
            metrics["grad_norm_N"] = layer_norms(grads)
        averages = state.ema
        if ema:
            averages = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, _float32(params))
        new = TrainState(state.step + 1, state.updates + 1, params, opt_state, state.key_W, averages)
        return new, metrics | {"updates": new.updates}

    return train_step


def layer_norms(tree: Any) -> jax.Array:
    """norm_N of the leaves that are stacks of layers (N first in their names): one Euclidean norm for each layer."""
    leaves = [x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0] if suffix(path[-1].key).startswith("N")]
    return jnp.sqrt(sum(jnp.square(x.astype(jnp.float32)).reshape(len(x), -1).sum(axis=1) for x in leaves))


def _micro_batches(x: jax.Array, letters: str, parts: int) -> jax.Array:
    """Cuts B into (parts) B, row i going to part i % parts: each device splits its own rows and sends none away."""
    assert letters.startswith("B"), "a batch's arrays begin with B"
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def compile_step(step: Callable, mesh: Mesh, state: Any, frozen: Any, batch: Any) -> Callable:
    """jit ("pjit") with the shardings that the names say, in and out; the old state is donated, `frozen` is not."""
    state_s, frozen_s, batch_s = (shardings(tree, mesh) for tree in (state, frozen, batch))
    return jax.jit(step, in_shardings=(state_s, frozen_s, batch_s), out_shardings=(state_s, None), donate_argnums=0)


def fit(
    step: Callable,
    state: TrainState,
    frozen: Any,
    batches: Iterator[tuple[dict, dict]],
    until: int,
    *,
    mesh: Mesh,
    rows: LocalRows | None = None,
    log: Callable[[int, dict], None],
    save: Callable[[int, TrainState, dict], None],
    save_every: int,
    save_at: Collection[int] = (),
    hooks: dict[Callable[[int, TrainState], None], int] | None = None,
    stop: Callable[[], bool] = lambda: False,
    trace: tuple[int, int, Path] | None = None,
) -> TrainState:
    """Trains from state.step to `until` and returns the last state.

    `batches` yields (host batch, state of the data after it); what is saved belongs to the last batch trained. A thread
    asks for the next batch and sends it to the devices while a step runs, one batch ahead and no more; what `batches`
    raises is raised here in that batch's place. With `rows` each batch holds only those: what this process must give.
    metrics["input_seconds"] is how long a step waited for its batch.
    log(i, metrics) is called once a step, in order, while the device works on the next one; before a save or a hook,
    every step so far has been logged. save and then the hooks {hook: every} run each so many steps and at the end, save
    also after each step in `save_at`.
    Raises Interrupted, after a save, when stop() turns true, and Diverged where the numbers end.
    trace = (first, last, folder) profiles those steps.
    """
    require_mesh(state)

    def take() -> tuple[dict, dict]:
        host_batch, data_state = next(batches)
        return to_global(host_batch, mesh, rows), data_state

    def report(i: int, metrics: dict) -> None:
        values = jax.device_get(metrics)
        log(i, values)  # also where the numbers end: a sweep reads there that the run diverged
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise Diverged(f"{name} is {values[name]} at step {i}; lower optim.learning_rate or optim.clip_norm")

    previous, start = None, int(state.step) + 1
    # A run that is resumed within the steps to trace, or ends there, traces those that it makes.
    first, last = (max(trace[0], start), min(trace[1], until)) if trace else (0, 0)
    with ThreadPoolExecutor(1, "input") as thread:
        coming = thread.submit(take) if start <= until else None
        for i in range(start, until + 1):
            assert coming is not None
            asked = time.perf_counter()
            batch, data_state = coming.result()
            waited = time.perf_counter() - asked
            if trace and i == first <= last:
                jax.profiler.start_trace(trace[2])
            state, metrics = step(state, frozen, batch)  # dispatched, not yet computed
            metrics["input_seconds"] = waited
            stopping = stop()
            if i < until and not stopping:  # a batch that nobody wants could keep a stopped run waiting
                coming = thread.submit(take)
            if trace and first <= i <= last and (i == last or stopping):
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
            if previous is not None:
                report(i - 1, previous)
            previous = metrics
            saving = stopping or i % save_every == 0 or i in save_at or i == until
            due = [hook for hook, every in (hooks or {}).items() if i % every == 0 or i == until]
            if saving or due:
                report(i, metrics)
                previous = None
            if saving:
                save(i, state, data_state)
            if stopping and i < until:
                raise Interrupted
            for hook in due:
                hook(i, state)
    return state


class Signals:
    """Signals to end: until `defer` the first one raises Interrupted; after it, `stop` turns true instead.

    A second Ctrl-C ends the process at once. Of what schedulers send no second one does: they send it to a process
    and to its parents, which pass it on, and Slurm its warning (SIGUSR1, with --signal) and then SIGTERM.
    """

    NAMES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self):
        self._deferred = self._received = False

    def defer(self) -> None:
        self._deferred = True

    def stop(self) -> bool:
        return self._received

    def __call__(self, number: int, frame: Any) -> None:
        self._received = True
        for name in self.NAMES:
            signal.signal(name, signal.SIG_DFL if name == signal.SIGINT else signal.SIG_IGN)
        if not self._deferred:
            raise Interrupted


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Signals]:
    """Catches the signals with which schedulers and users end a run, for as long as the block lasts."""
    signals = Signals()
    before = {name: signal.signal(name, signals) for name in Signals.NAMES}
    try:
        yield signals
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class TimeLimit:
    """Tells when it is time to save, so that a run ends before `seconds` (0: never) have passed since it started.

    `near` is to be called once a step. Left for the end are three times the longest step so far, with the evaluations
    and saves that fell into it, twice the longest save, and MARGIN seconds. save_seconds() is how long a save took.
    """

    MARGIN = 20.0

    def __init__(self, seconds: float, started: float, save_seconds: Callable[[], float]):
        self._end = started + seconds if seconds else math.inf
        self._save_seconds, self._longest, self._last = save_seconds, 0.0, time.monotonic()

    def near(self) -> bool:
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        return now + 3 * self._longest + 2 * self._save_seconds() + self.MARGIN > self._end


def compile_cache_folder() -> Path:
    """The user's folder of compiled programs."""
    return cache_folder() / "compiled"


def others_can_write(folder: Path) -> bool:
    """True where a folder belongs to another user, or is open to others."""
    status = folder.stat()
    return status.st_uid != os.getuid() or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def enable_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder. Call it before anything is compiled.

    What lies there is run, so a folder that others can write to is refused with InputError.
    """
    folder = compile_cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder} can't be made ({e.strerror}); set XDG_CACHE_HOME, or --no-compile-cache") from e
    if others_can_write(folder):
        raise InputError(f"{folder} can be written by others; run `chmod 700 {folder}`, or give --no-compile-cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

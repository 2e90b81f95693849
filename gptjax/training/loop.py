"""The training loop of every stage: knows no model, only a step and batches."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.parallel.sharding import LocalRows, require_mesh, to_global
from gptjax.training.step import TrainState
from gptjax.training.stop import Interrupted


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number; nothing is saved from that step on."""


Batches = Iterator[tuple[dict, dict]] | Callable[[TrainState], tuple[dict, dict]]
"""(host batch, state of the data after it), one after the other; or the function that makes them from the state."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The caller's part in the loop: logs, saves, evaluations, an early end, a profile."""

    log: Callable[[int, dict, dict], None] = lambda i, metrics, data_state: None
    """Called once a step, in order, while the device works on the next one."""
    save: Callable[[int, TrainState, dict], None] = lambda i, state, data_state: None
    """Called each `save_every` steps, after the steps in `save_at`, at the end, and before an early one."""
    save_every: int = 2**31
    save_at: Collection[int] = ()
    evaluate: Callable[[int, TrainState], bool | None] = lambda i, state: False
    """Called each `evaluate_every` steps and at the end, after the save of that step; True: the run ends with it."""
    evaluate_every: int = 2**31
    stop: Callable[[], bool] = lambda: False
    """Asked once a step whether to save and end now."""
    trace: tuple[int, int, Path] | None = None
    """First and last step to profile, and the folder to write to."""


def fit(
    step: Callable,
    state: TrainState,
    frozen: Any,
    batches: Batches,
    until: int,
    *,
    mesh: Mesh,
    rows: LocalRows | None = None,
    hooks: Hooks,
) -> TrainState:
    """Trains from state.step to `until` and returns the last state.

    An iterator of batches is read ahead by a thread, which sends the next batch to the devices while a step runs, one
    ahead and no more; what the iterator raises is raised here in that batch's place. A function of the state, for
    on-policy batches, is called in this thread after the last update. With `rows` each batch holds only those: this
    process's part. metrics["input_seconds"] is how long a step waited for its batch.

    What is saved belongs to the last batch trained, and every step so far has been logged before a save or an
    evaluation. Where hooks.evaluate returns True the state of that step is saved and returned. Raises Interrupted,
    after a save, when hooks.stop() turns true, and Diverged where the loss or the gradient is no longer finite.
    """
    require_mesh(state)
    on_policy = callable(batches)

    def take(state: TrainState | None) -> tuple[dict, dict]:
        host_batch, data_state = batches(state) if on_policy else next(batches)  # pyright: ignore
        return to_global(host_batch, mesh, rows), data_state

    def report(i: int, metrics: dict, data_state: dict) -> None:
        values = jax.device_get(metrics)
        hooks.log(i, values, data_state)  # also where the numbers end: a sweep reads there that the run diverged
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise Diverged(f"{name} is {values[name]} at step {i}; lower optim.learning_rate or optim.clip_norm")

    unreported, start, trace = None, int(state.step) + 1, hooks.trace
    # A run that is resumed within the steps to trace, or ends there, traces those that it makes.
    first, last = (max(trace[0], start), min(trace[1], until)) if trace else (0, 0)
    with ThreadPoolExecutor(1, "input") as thread:
        ahead = None if on_policy or start > until else thread.submit(take, None)
        for i in range(start, until + 1):
            asked = time.perf_counter()
            batch, data_state = take(state) if ahead is None else ahead.result()
            waited = time.perf_counter() - asked
            if trace and i == first <= last:
                jax.profiler.start_trace(trace[2])
            state, metrics = step(state, frozen, batch)  # dispatched, not yet computed
            metrics["input_seconds"] = waited
            stopping = hooks.stop()
            if ahead is not None and i < until and not stopping:  # an unwanted batch could keep a stopped run waiting
                ahead = thread.submit(take, None)
            if trace and first <= i <= last and (i == last or stopping):
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
            if unreported is not None:
                report(*unreported)
            unreported = i, metrics, data_state
            saves = stopping or i % hooks.save_every == 0 or i in hooks.save_at or i == until
            evaluates = i % hooks.evaluate_every == 0 or i == until
            if saves or evaluates:
                report(*unreported)
                unreported = None
            if saves:
                hooks.save(i, state, data_state)
            if stopping and i < until:
                raise Interrupted
            if evaluates and hooks.evaluate(i, state):
                if not saves:
                    hooks.save(i, state, data_state)
                break
    return state

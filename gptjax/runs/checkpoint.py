"""Checkpoints that survive a kill at any moment and never restore garbage. The only module that imports orbax.

A step is a folder named by its number. Orbax writes it in the background; when Orbax is done, a manifest of every
file (size and sha256) is written last, atomically: a step without a manifest does not exist. Orbax itself does not
notice a flipped bit in array data, so each leaf also carries a digest computed on the device, compared at restore.
While a step is written or deleted, a file named after it and PENDING lies beside it: so leftovers of a kill differ from
steps whose manifests were lost.
"""

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.config import CheckpointConfig
from gptjax.config.section import InputError, one_line
from gptjax.parallel.processes import all_agree, barrier, broadcast_from_main, process_label
from gptjax.runs.digest import digests, named_leaves
from gptjax.runs.manifest import (
    MANIFEST,
    PENDING,
    check_manifest,
    committed_steps,
    folder_files,
    unsealed_steps,
    write_manifest,
)
from gptjax.runtime.status import write_line
from gptjax.storage import PROBE, TRASH, StorageError, filesystem, resolve_path

UNSOUND = ".unsound"
JSON_ITEMS = ("data", "config", "digests")
AGAIN = "mend that, then run the same command again to go on"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written: the disk is full, or went away. The message is one line."""


class Saved(NamedTuple):
    """One committed step; `seconds` is the time of its commit since the epoch."""

    step: int
    bytes: int
    files: int
    seconds: float


class Checkpoints:
    """The checkpoints of one run, in `folder`.

    A writer (the default) makes the folder, refuses one it can't write to, and removes what a killed save or delete
    left behind. With `readonly` nothing is made or removed, so that a run can be read while it trains.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig, readonly: bool = False):
        folder = resolve_path(folder)
        self.store = filesystem(folder)
        self.folder, self.cfg, self.readonly = self.store.absolute(folder), cfg, readonly
        self.problems: list[str] = []
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self.seconds = 0.0  # of the longest save so far, from the call to its commit
        if not readonly:
            self.store.make_writable(self.folder, "checkpoints")
            self.clean()

    # What is on the disk.

    def steps(self) -> list[int]:
        """The committed steps, in order, read from the disk at each call."""
        return committed_steps(self.folder)

    def newest(self) -> int | None:
        """The newest committed step; None where there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def describe(self) -> list[Saved]:
        """Size, number of files and time of each committed step."""
        saved = []
        for step in self.steps():
            files = folder_files(self.path(step))
            with contextlib.suppress(FileNotFoundError):  # deleted in this moment by the run that owns it
                seconds = self.store.seconds(self.path(step) / MANIFEST)
                saved.append(Saved(step, sum(files.values()), len(files), seconds))
        return saved

    def verify(self, step: int) -> list[str]:
        """Returns the problems of a step's files, one line each; empty where all are as they were written."""
        return check_manifest(self.path(step), step)

    def data_state(self, step: int) -> dict:
        """The position in the data that a step was saved with; raises InputError where it can't be read."""
        path = self.path(step) / "data" / "data.json"
        try:
            return json.loads(self.store.read(path))
        except StorageError:
            raise
        except (OSError, ValueError) as e:
            raise InputError(f"{path} can't be read ({one_line(e)}); see gptjax checkpoint verify") from e

    # Writing.

    def save(
        self,
        step: int,
        state: Any,
        data: dict,
        config: dict,
        first: Callable[[], None] = lambda: None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Saves in the background; `state` may be donated as soon as this returns.

        `data` (the position in the data) and `config` hold what JSON can hold. A step that is already committed is
        left as it is. `first` is called by process 0 before the step is committed, to bring what a committed step
        promises to be there, and `then` once it is. Waits for the save before it, and raises CheckpointError where that
        one failed.
        """
        assert not self.readonly, "these checkpoints were opened for reading"
        self.wait()
        if broadcast_from_main("saved", step in self.steps()):
            return
        from orbax.checkpoint import v1 as ocp

        leaves = named_leaves(state)
        marks = {n: [d, str(leaves[n].dtype), list(leaves[n].shape)] for n, d in digests(state).items()}
        items = {"state": _nested(leaves), "data": data, "config": config, "digests": marks}
        try:
            staged = self.store.stage(self.path(step))
            self._mark_pending(step)
            with _orbax():
                response = ocp.save_checkpointables_async(str(staged), items)
        except Exception as e:
            self._remove_partial(step)
            raise _failed(step, e) from e
        self._began = time.monotonic()
        commit = (step, response, staged, first, then)
        self._thread = threading.Thread(target=self._commit, args=commit, name=f"checkpoint {step}")
        self._thread.start()

    def check(self) -> None:
        """Raises CheckpointError if a save failed in the background; does not wait for one that runs.

        Raises InputError where another process took the run over, which can happen in a bucket.
        """
        self.store.check(self.folder)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, all_processes: bool = True) -> None:
        """Returns when every save is durable; raises CheckpointError if one failed. Call it before the process ends.

        All processes wait for each other, so all must call it; without `all_processes` this one waits for its own part.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if all_processes:
                barrier("checkpoint committed")
        self.check()

    def _commit(self, step: int, response: Any, staged: Path, first: Callable[[], None], then: Callable) -> None:
        try:
            response.result()
            self.store.check(self.folder, now=True)
            self.store.publish(staged, self.path(step))
            if jax.process_index() == 0:
                first()
                self.store.check(self.folder, now=True)
                write_manifest(self.path(step), step)
                self.store.remove(self._pending(step))
                then()
            self.seconds = max(self.seconds, time.monotonic() - self._began)
        except Exception as e:
            self._error = _failed(step, e)
            self._remove_partial(step)

    def _pending(self, step: int) -> Path:
        return self.folder / f"{step:08d}{PENDING}"

    def _mark_pending(self, step: int) -> None:
        if jax.process_index() == 0:
            self.store.write(self._pending(step), b"")

    def _remove_partial(self, step: int) -> None:
        """Removes what a failed save left, where this process still holds the run: else the step may be another's."""
        if jax.process_index() == 0:
            with contextlib.suppress(InputError):  # lost, or a store that does not answer: the next start cleans
                self.store.check(self.folder, now=True)
                for name in sorted(self.store.names(self.folder)):  # the folder before its mark
                    if name == f"{step:08d}" or name.startswith(f"{step:08d}.orbax"):
                        self.store.remove(self.folder / name)

    def clean(self) -> None:
        """Removes what a kill in the middle of a save or a delete left behind.

        Raises InputError for steps that have lost their manifests in another way: a copy of the run may lack them.
        """
        if jax.process_index() == 0:
            leftovers = unsealed_steps(self.folder)
            for name in sorted(self.store.names(self.folder)):  # a step before its mark
                if name in leftovers or re.match(r"[0-9]{8,}\.orbax", name) or name.startswith((TRASH, PROBE)):
                    self.store.remove(self.folder / name)
        barrier("checkpoints cleaned")

    def retain(self, best: list[int]) -> list[int]:
        """Deletes what nothing keeps and returns those steps.

        Kept are the `keep_newest` newest, those in `at`, the multiples of `keep_every`, and `best`: the steps of lowest
        evaluation loss, which the caller reads from metrics.jsonl.
        """
        steps, every = self.steps(), self.cfg.keep_every
        kept = {*steps[-self.cfg.keep_newest :], *self.cfg.at, *best, *(s for s in steps if every and s % every == 0)}
        gone = [s for s in steps if s not in kept]
        if jax.process_index() == 0:
            for step in gone:
                self.store.check(self.folder, now=True)
                self._mark_pending(step)
                self.store.discard(self.path(step), MANIFEST)
                self.store.remove(self._pending(step))
        return gone

    # Reading.

    def restore(self, abstract_state: Any, step: int | None = None, partial: bool = False):
        """Returns (step, state, data, config) of `step`, or of the newest step that is sound.

        `abstract_state` is a tree of jax.ShapeDtypeStruct, whose shardings say where the leaves go; the mesh need
        not be the one that saved. With `partial` the tree may lack leaves that the checkpoint has. What is wrong
        with a step is written to stderr and kept in `problems`, and the next older step is tried; a writer then sets
        the unsound ones aside. Raises InputError where no step is sound, and where a sound step holds other leaves,
        shapes or types than asked for.
        """
        steps = broadcast_from_main("steps", self.steps())
        if not steps or (step is not None and step not in steps):
            none = "it was not saved yet, or its checkpoints were removed; train it (again), or name another run"
            has = f"there are steps {', '.join(map(str, steps))}" if steps else none
            raise InputError(f"{self.folder}: no checkpoint{'' if step is None else f' of step {step}'}; {has}")
        tried = []
        for candidate in [step] if step is not None else reversed(steps):
            problems = self.verify(candidate) if jax.process_index() == 0 else []
            if all_agree(not problems):
                with self.store.readable(self.path(candidate)) as path:
                    state, data, config, problems = self._load(str(path), candidate, abstract_state, partial)
                if all_agree(not problems):
                    self._set_aside([s for s in steps if s > candidate and step is None])
                    return candidate, state, data, config
            shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            tried.append(f"step {candidate}: {shown or 'not sound for another process, which says why'}")
            self.problems += [f"step {candidate}: {p}" for p in problems]
            if problems:  # each process reports its own
                where = f"{process_label()}: " if process_label() else ""
                line = f"warning: {where}checkpoint {self.path(candidate)} is not sound: {shown}"
                write_line(line)
        raise InputError(f"{self.folder}: no sound checkpoint ({' | '.join(tried)}); give another --run-dir, or a copy")

    def _set_aside(self, steps: list[int]) -> None:
        """Renames unsound steps, which would else count as the newest and be taken for saved when reached again."""
        if not self.readonly and jax.process_index() == 0:
            for step in steps:
                aside = self.folder / f"{step:08d}{UNSOUND}"
                self.store.remove(aside)
                self._mark_pending(step)
                self.store.move(self.path(step), aside, MANIFEST)
                self.store.remove(self._pending(step))
                write_line(f"warning: it was set aside as {aside}")
        barrier("unsound checkpoints set aside")

    def _load(self, path: str, step: int, abstract_state: Any, partial: bool) -> tuple[Any, Any, Any, list[str]]:
        """(state, data, config, problems) of a step; the first three are None where they can't be read."""
        from orbax.checkpoint import v1 as ocp

        asked, marks, problems = named_leaves(abstract_state), {}, []
        try:
            with _orbax():
                marks = ocp.load_checkpointables(path, {"digests": None})["digests"]
        except Exception as e:
            problems = [f"digests can't be read: {one_line(e)}"]
        if not all_agree(not problems):  # before the load of the arrays, in which all take part
            return None, None, None, problems
        self._check_leaves(step, asked, marks, partial)
        wanted = _nested({name: _placed(leaf) for name, leaf in asked.items()})
        try:
            with _orbax(partial):
                loaded = ocp.load_checkpointables(path, {"state": wanted, "data": None, "config": None})
        except Exception as e:
            return None, None, None, [f"state can't be read: {one_line(e)}"]
        found = named_leaves(loaded["state"])
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [found[name] for name in asked])
        wrong = [n for n, d in digests(state).items() if d != marks[n][0]]
        return state, loaded["data"], loaded["config"], [f"{n} differs from what was saved" for n in wrong]

    def _check_leaves(self, step: int, asked: dict[str, Any], marks: dict[str, Any], partial: bool) -> None:
        where, then = f"{self.path(step)}", "keep the settings of the run, or give another --run-dir"
        for name, leaf in asked.items():
            if name not in marks:
                raise InputError(f"{where} has no {name}, which these settings ask for; {then}")
            _, dtype, shape = marks[name]
            if tuple(shape) != leaf.shape or dtype != str(leaf.dtype):
                raise InputError(
                    f"{where} holds {name} as {dtype}{shape}, but these settings ask for "
                    f"{leaf.dtype}{list(leaf.shape)}; {then}"
                )
        if not partial and (left := [n for n in marks if n not in asked]):
            raise InputError(f"{where} holds {left[0]}, which these settings do not ask for; {then}")


@contextlib.contextmanager
def _orbax(partial: bool = False):
    """Orbax's settings: small items as JSON, and arrays uncompressed, since trained weights hardly shrink."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for name in JSON_ITEMS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = partial
    # Orbax's threads log each failure with its traceback; here it is raised, and told in one line.
    logging.getLogger("absl").addFilter(_not_of_orbax)
    with context:
        yield


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _nested(leaves: dict[str, Any]) -> dict:
    """Plain nested dicts from dotted names, so that any program can read the state."""
    tree: dict = {}
    for name, leaf in leaves.items():
        *folders, last = name.split(".")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = leaf
    return tree


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _failed(step: int, error: Exception) -> CheckpointError:
    failed = CheckpointError(f"checkpoint of step {step} could not be written: {one_line(error)}; {AGAIN}")
    failed.__cause__ = error  # it may be raised by another thread
    return failed

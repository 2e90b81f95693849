"""Runs the jobs of a sweep, in one process or several on the same folder.

A job is claimed by a lock on claims/NAME, which its process inherits: it is free again as soon as both are gone,
however they ended. What is done is read from the runs themselves, so nothing has to be kept in step with them.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gptjax.config.command_line import Recipe, parse
from gptjax.config.section import InputError, one_line
from gptjax.config.sweep import SweepConfig
from gptjax.data.prepared import open_corpora
from gptjax.runtime.process import pinned, require_workers
from gptjax.runtime.restart import MOST_IN_VAIN, RESTART_ON, exit_code, pause_before
from gptjax.scaling.sweep.fork import checkpoints_of, fork
from gptjax.scaling.sweep.jobs import Job, add_points, check_recipe, read_jobs, write_jobs
from gptjax.scaling.sweep.points import Point, make_points, split_entries
from gptjax.scaling.sweep.table import Results, run_dir, write_table
from gptjax.storage import StorageError
from gptjax.training.progress import duration

Say = Callable[[str], None]

DIVERGED = 3  # how pretrain ends a run that failed for good
PAUSE, POLL = 5.0, 0.2  # seconds before a restart, and between two looks at the jobs
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ENDED_BY_US = tuple(128 + number for number in SIGNALS)  # before it could save, while it was still starting
GPTJAX = (sys.executable, "-m", "gptjax")


def sweep(cfg: SweepConfig, recipe: Recipe, say: Say, gptjax: Sequence[str] = GPTJAX) -> int:
    """Adds the grid's points to the table of the sweep in cfg.out and runs all of its jobs that are not finished.

    Returns 0 when all are, 75 when a signal ended it, with what ran saved; where a job failed for good or was given up,
    that job's code (for 75: 3). A job that diverged is given up, and the others go on. Raises InputError for what is
    wrong with the grid, the recipe or the data, and for several workers on an accelerator. `gptjax` is its command.
    """
    require_workers(cfg.workers)
    folder = Path(cfg.out).absolute()
    cfg = _with_dtype(cfg, recipe, folder)
    points = make_points(cfg, recipe)
    command = [*gptjax, "pretrain", str(recipe.path.absolute())]
    try:
        for name in ("runs", "logs", "claims"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            jobs = _table(cfg, recipe, points, folder, say)
        return _Workers(folder, jobs, command, cfg.workers, say).work()
    except (StorageError, BrokenPipeError):  # a store's outage, or the end of who reads our lines: not the folder's
        raise
    except OSError as e:
        raise InputError(
            f"{e.filename or folder}: {e.strerror or e}; make room for the sweep or give another --out, "
            "and run the same command again"
        ) from e


def _table(cfg: SweepConfig, recipe: Recipe, points: list[Point], folder: Path, say: Say) -> list[Job]:
    """The table of jobs with those of the points, written where it is new. The caller must hold the sweep's lock."""
    before = read_jobs(folder)
    check_recipe(before, points, recipe)
    corpus = _corpus(points, folder, say)
    given = [entry for entry in cfg.set if f"--{entry.partition('=')[0]}" not in corpus]
    jobs = add_points(before, points, [*split_entries(given), *corpus])
    if jobs != before:
        write_jobs(folder, jobs)
    return jobs


def _with_dtype(cfg: SweepConfig, recipe: Recipe, folder: Path) -> SweepConfig:
    """The settings with one dtype for all runs where the recipe says auto: that of the sweep's table, if it has one."""
    size = cfg.points[0][1] if cfg.grid else ""
    given = parse(recipe.config("pretrain", size), split_entries(cfg.set), f"gptjax sweep {recipe.path}")
    if given.model.dtype != "auto":
        return cfg
    flags = next((job.flags for job in read_jobs(folder)), ())
    kept = flags[flags.index("--model.dtype") + 1] if "--model.dtype" in flags else _preferred_dtype()
    return dataclasses.replace(cfg, set=(*cfg.set, f"model.dtype={kept}"))


def _preferred_dtype() -> str:
    """The type that a run's device prefers, asked in a process of its own: one that holds it would keep runs out."""
    code = "from gptjax.runtime.dtype import preferred_dtype; print(preferred_dtype()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"model.dtype=auto: {one_line(done.stderr, 200)}; give --set model.dtype=float32 or bfloat16")
    return done.stdout.split()[-1]


def _corpus(points: list[Point], folder: Path, say: Say) -> list[str]:
    """Prepares the text once, for all runs, and returns the flags that name its folder."""
    config = points[0].config
    if config.data.loading == "stream":
        return []
    found = open_corpora(config, folder / "corpus", training=True, resumes=False, say=say)
    if config.data.source == "mixture":
        return ["--data.mixture", *(f"{name}={corpus.folder}" for name, corpus in found.items())]
    return ["--data.source", str(found[""].folder)]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of the sweep's tables; waits for other processes, and ends with this one."""
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class _Running:
    """A running job: its process, its claim, and the time and checkpoint at its start."""

    job: Job
    process: subprocess.Popen[bytes]
    claim: IO[str]
    began: float
    reached: int


class _Workers:
    """The workers of this process, each with its share of the cores, and their jobs."""

    def __init__(self, folder: Path, jobs: list[Job], command: list[str], workers: int, say: Say):
        self._folder, self._command, self._say = folder, command, say
        self._jobs = {job.name: job for job in sorted(jobs, key=lambda job: (not job.saves, -job.own_flops, job.name))}
        self._results = Results(folder)
        self._slots: list[_Running | None] = [None] * workers
        self._in_vain: dict[str, int] = {}
        self._given_up: dict[str, int] = {}  # the code of each
        for job in jobs:
            self._give_up_diverged(job)
        self._not_before: dict[str, float] = {}
        self._done_flops = self._done_seconds = 0.0
        self._shortest = math.inf
        self._stopping, self._told, self._code = False, False, 0

    def work(self) -> int:
        """Runs jobs until all are finished here or elsewhere or given up, one fails for good, or a signal comes."""
        before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            while True:
                for slot, running in enumerate(self._slots):
                    if running is not None and running.process.poll() is not None:
                        self._slots[slot] = None
                        self._ended(running)
                if self._code:
                    self._end_children()
                    break
                if self._stopping:
                    self._end_children()
                    self._code = 75
                    self._say("interrupted; run the same command again to go on with the sweep")
                    break
                left = [job for job in self._jobs.values() if self._results.of(job) is None and not self._hopeless(job)]
                if not left and not any(self._slots):
                    self._tell_of_given_up()
                    break
                for slot, running in enumerate(self._slots):
                    if running is None:
                        self._slots[slot] = self._take(slot, left)
                self._tell_of_waiting(left)
                time.sleep(POLL)
        except Exception:
            self._end_children()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        with _locked(self._folder):
            write_table(self._folder, self._results)
        return self._code

    def _tell_of_waiting(self, left: list[Job]) -> None:
        """Says once that nothing runs here because of other processes, also those that a killed sweep left behind."""
        paused = any(time.monotonic() < until for until in self._not_before.values())
        if not (any(self._slots) or paused or self._told):
            self._told = True
            self._say(f"waiting: other processes run what is left, {len(left)} jobs, or what those start from")

    def _hopeless(self, job: Job) -> bool:
        """True where the job, or what it must wait for, was given up."""
        if job.name in self._given_up:
            return True
        return bool(self._given_up and job.start) and not self._ready(job) and self._hopeless(self._jobs[job.parent])

    def _give_up_diverged(self, job: Job) -> bool:
        """Gives up a job whose loss has ended as no finite number: from where it was saved it would do so again."""
        if diverged := self._results.of(job) is None and bool(self._results.diverged(job)):
            self._given_up[job.name] = DIVERGED
        return diverged

    def _tell_of_given_up(self) -> None:
        left = [name for name, job in self._jobs.items() if self._results.of(job) is None]
        for name in left:
            if step := self._results.diverged(self._jobs[name]):
                self._say(f"diverged at step {step}, loss inf in table.csv: {name} (to train it again, delete its run)")
        if codes := [code for name, code in self._given_up.items() if name in left]:
            self._code = 3 if codes[0] == 75 else codes[0]  # 75 would have the sweep started again
            if waiting := [name for name in left if name not in self._given_up]:
                self._say(f"not started, for what they start from was given up: {', '.join(waiting)}")

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _take(self, slot: int, left: list[Job]) -> _Running | None:
        """Starts the first job that can be had; None where there is none."""
        for job in left:
            if time.monotonic() < self._not_before.get(job.name, 0.0) or not self._ready(job):
                continue
            claim = (self._folder / "claims" / job.name).open("a")
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                claim.close()
                continue
            if self._results.of(job) is not None or self._give_up_diverged(job):  # in another process, meanwhile
                claim.close()
                continue
            return self._start(slot, job, claim)
        return None

    def _ready(self, job: Job) -> bool:
        """True once its starting checkpoint exists, or can no longer come, in which case it starts from scratch."""
        if not job.start or self._run(job).exists():
            return True
        parent = self._jobs[job.parent]
        return job.start in checkpoints_of(self._run(parent)).steps() or self._results.of(parent) is not None

    def _run(self, job: Job) -> Path:
        return self._folder / run_dir(job)

    def _start(self, slot: int, job: Job, claim: IO[str]) -> _Running:
        run = self._run(job)
        if job.start and not run.exists():
            problems = fork(self._run(self._jobs[job.parent]), job.start, run, job.steps)
            if problems:
                self._say(f"{job.name} starts from nothing: step {job.start} of {job.parent}: {problems[0]}")
        command = [*self._command, *job.flags, "--run-dir", str(run)]
        self._note(job, event="start")
        with (self._folder / "logs" / f"{job.name}.log").open("ab") as log, pinned(slot, len(self._slots)):
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[claim.fileno()]
            )
        return _Running(job, process, claim, time.monotonic(), self._newest(job))

    def _newest(self, job: Job) -> int:
        return checkpoints_of(self._run(job)).newest() or 0

    def _ended(self, running: _Running) -> None:
        """Handles the end of a job: finished, to be restarted, or failed for good."""
        job, code = running.job, exit_code(running.process.returncode)
        seconds, found, newest = time.monotonic() - running.began, self._results.of(job), self._newest(job)
        self._note(job, event="end", code=code, seconds=round(seconds, 3))
        running.claim.close()
        if newest > running.reached:
            self._done_flops += job.flops * (newest - running.reached) / job.steps
            self._done_seconds += seconds
        if found is not None:
            self._shortest = min(self._shortest, seconds)
            with _locked(self._folder):
                write_table(self._folder, self._results)
            done = sum(self._results.of(job) is not None for job in self._jobs.values())
            result = f"{job.name}: loss {found[0]:.4f} in {duration(seconds)}{self._time_left()}"
            self._say(f"{done}/{len(self._jobs)} jobs  {result}")
            return
        log = self._folder / "logs" / f"{job.name}.log"
        if code == DIVERGED and self._give_up_diverged(job):
            self._say(f"job {job.name} diverged at step {self._results.diverged(job)}; see {log}")
            return
        ended = self._stopping and code in ENDED_BY_US
        if code not in RESTART_ON and not ended:
            self._say(f"job {job.name} ended with {code}, without its result; see {log}")
            self._code = self._code or code or 3
            return
        self._in_vain[job.name] = 0 if newest > running.reached else self._in_vain.get(job.name, 0) + 1
        in_vain = self._in_vain[job.name]
        if in_vain >= MOST_IN_VAIN and not self._stopping:
            self._say(f"job {job.name} ended with {code}, {in_vain} times in a row without progress; see {log}")
            self._given_up[job.name] = code
        elif not self._stopping:
            self._say(f"job {job.name} ended with {code} after step {newest}: it is started again")
            self._not_before[job.name] = time.monotonic() + pause_before(in_vain, PAUSE)

    def _end_children(self) -> None:
        """Makes every job save and exit, and waits for all of them."""
        self._stopping = True
        left = [running for running in self._slots if running]
        self._slots = [None] * len(self._slots)
        for running in left:
            running.process.terminate()
        for running in left:
            running.process.wait()
        for running in left:
            self._ended(running)

    def _time_left(self) -> str:
        """The estimated time left, by the speed of finished jobs, none shorter than the shortest; empty without any."""
        left = [job for job in self._jobs.values() if self._results.of(job) is None]
        if not left or not self._done_flops:
            return ""
        rate = self._done_seconds / self._done_flops
        seconds = sum(max(job.own_flops * rate, self._shortest) for job in left)
        return f"; about {duration(seconds / len(self._slots))} left"

    def _note(self, job: Job, **values: Any) -> None:
        """Adds a line to times.jsonl, in one piece, for several processes write there."""
        line = {"time": round(time.time(), 3), "job": job.name, "host": platform.node(), "process": os.getpid()}
        descriptor = os.open(self._folder / "times.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line | values) + "\n").encode())
        finally:
            os.close(descriptor)

"""The frame of every stage: processes, mesh, run folder, checkpoints, metrics, signals and the time limit."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import GenerateConfig, MeshConfig, TrainConfig, check_divisible
from gptjax.config.section import leaves, one_line
from gptjax.ops.attention import describe
from gptjax.parallel.processes import barrier, broadcast_from_main, is_main_process, join_processes, say, working
from gptjax.parallel.sharding import local_rows, make_mesh
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.events import write_event
from gptjax.runs.load import load_model
from gptjax.runs.manifest import committed_steps
from gptjax.runs.report import write_page
from gptjax.runs.run import Provenance, Run, load_config
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.runtime.dtype import preferred_dtype
from gptjax.runtime.process import STARTED
from gptjax.runtime.status import entry
from gptjax.stages.exports import Exports
from gptjax.stages.summary import describe_memory
from gptjax.tokenizer import Tokenizer
from gptjax.training.loop import Batches, Diverged, Hooks, fit
from gptjax.training.metrics import Metrics
from gptjax.training.sinks import check_sinks
from gptjax.training.step import TrainState
from gptjax.training.stop import Interrupted, Signals, Stop, TimeLimit, stop_on_signals

SAVE_BYTES_A_SECOND = 5e7  # of a process, to a slow disk: the first guess of how long the last save may take


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The processes of a stage: their mesh, the signals they get, and what is closed at their end."""

    mesh: Mesh
    signals: Signals
    cleanup: contextlib.ExitStack
    config: Any
    """The stage's settings, in which no dtype is auto."""
    dtype_reason: str
    """The reason for the dtype that auto became; "" where the settings name one."""

    def describe_step(
        self, config: TrainConfig, shapes: TrainState, frozen: Mapping[str, Any] | None = None, images: int = 0
    ) -> None:
        """Prints what is known of a stage's step once its devices are: dtype, attention, memory."""
        if self.dtype_reason:
            say(entry("dtype", f"{config.model.dtype}: {self.dtype_reason}"))
        say(entry("attention", describe(config.model, config.data.length, config.data.several_documents)))
        say(entry("memory", describe_memory(config, shapes, self.mesh.shape, frozen, images)))


@contextlib.contextmanager
def join(config: TrainConfig, provenance: Provenance) -> Generator[ProcessGroup]:
    """Joins the job's processes and sets the mesh. At the end everything on `cleanup` is closed, whatever fails."""
    with stop_on_signals() as signals, contextlib.ExitStack() as cleanup:
        check_sinks(config.sinks)
        with working("starting the devices"):
            join_processes(dict(leaves(config)) | {"recipe": provenance.sha256}, config.run_dir)
        if config.compile_cache:
            enable_compile_cache()
        mesh = make_mesh(config.mesh)
        check_divisible(config, mesh.shape)
        with working("measuring products"):
            config, reason = resolve_dtype(config)
        with jax.set_mesh(mesh):
            yield ProcessGroup(mesh, signals, cleanup, config, reason)


def resolve_dtype(config: TrainConfig) -> tuple[TrainConfig, str]:
    """The settings with a dtype in place of auto, and the reason: a run that has checkpoints keeps the dtype it has."""
    if config.model.dtype != "auto":
        return config, ""
    chosen: tuple[str, str] | None = None
    if is_main_process():
        begun = committed_steps(Run.at(config.run_dir).checkpoints)
        chosen = (load_config(config.run_dir).model.dtype, "as this run began") if begun else preferred_dtype()
    dtype, reason = broadcast_from_main("dtype", chosen)  # pyright: ignore[reportGeneralTypeIssues]
    return config.with_dtype(dtype), reason


class Runner:
    """A run that is being trained: its folder, which it holds, its checkpoints and its reports.

    Making one takes the folder's lock and prints the settings that changed since the last start; raises InputError
    where these are frozen, and for a folder that is held, can't be written to, or is no whole run.
    """

    def __init__(self, group: ProcessGroup, config: TrainConfig, provenance: Provenance):
        self.group, self.config = group, config
        self.run = Run.open(config.run_dir, config, provenance)
        group.cleanup.callback(self.run.close)
        for line in self.run.changes:
            say(line)
        self.checkpoints = Checkpoints(self.run.checkpoints, config.checkpoint)
        self.exports = Exports(self.run, config.checkpoint.export_every, config.steps)
        self.rows = local_rows(config.data.batch_size, group.mesh)
        self._logged, self._no_report = 0, False
        self._row_tokens = config.data.length

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Writes the tokenizer into the run's folder, and waits for all processes."""
        if is_main_process():
            tokenizer.save(self.run.tokenizer)
            self.run.push(self.run.tokenizer)
        barrier("ready")

    def restore(self, shapes: TrainState) -> tuple[TrainState, dict] | None:
        """The state and the data's state of the newest sound checkpoint; None where the run has none."""
        step, restored, rows = 0, None, 0
        if broadcast_from_main("newest", self.checkpoints.newest()) is not None:
            with working("reading the checkpoint"):
                step, state, data_state, _ = self.checkpoints.restore(shapes)
            say(f"resumed {self.run.folder} after step {step}")
            restored, rows = (state, data_state), data_state["rows"]
        kind, size = "started" if restored is None else "resumed", self.config.data.batch_size
        self._event(step, kind, rows=rows, batch_size=size, changes=self.run.changes)
        return restored

    def train(
        self,
        step: Callable,
        state: TrainState,
        frozen: Mapping[str, Any],
        batches: Batches,
        evaluate: Callable[[TrainState], dict],
        sample: Callable[[TrainState], str | Sequence[Mapping[str, Any]]],
        vocab_size: int,
        rows: int = 0,
        passes: float = 3.0,
        images: float = 0,
    ) -> TrainState:
        """Trains to config.steps with saves, evaluations, metrics and retention; returns the last state.

        It ends before where evaluate.patience says so, and says it; the same command again ends at once.

        `step` is compiled and `frozen` lies on the mesh; `evaluate` returns the metrics of the stage's own evaluation,
        `eval_loss` among them, and `sample` a continuation of generate.prompt, or "", or several answers, each with its
        prompt, text and reward. `rows`, `passes` and `images` are what `Metrics` counts a step by.
        Raises Interrupted after a signal or near the time limit, with everything saved, Diverged, and CheckpointError
        where a save fails.
        """
        config, start = self.config, int(state.step)
        self.group.cleanup.callback(self.report)
        metrics = Metrics(self.run.metrics_path, config, vocab_size, start, rows, passes, images)
        self._row_tokens = config.data.length * (rows or config.data.batch_size) // config.data.batch_size
        self.group.cleanup.callback(metrics.close)
        self.group.cleanup.enter_context(self.exports)
        self.group.cleanup.callback(self.checkpoints.wait, all_processes=False)
        self.exports.begin(start)  # the run may have ended before that was done
        evaluation = functools.partial(self._evaluate, metrics, evaluate, sample)
        due = start > 0 and (start % config.evaluate.every == 0 or start == config.steps)
        missing = due and is_main_process() and metrics.file.evaluation(start) is None
        if broadcast_from_main("evaluate", missing):
            evaluation(start, state)  # the run ended between a save and its evaluation
        until = start if start and self._ends(metrics) else config.steps
        size = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
        limit = TimeLimit(
            config.time_limit_seconds, STARTED, lambda: self.checkpoints.seconds or size / SAVE_BYTES_A_SECOND
        )
        hooks = Hooks(
            log=functools.partial(self._log, metrics),
            save=functools.partial(self._save, metrics),
            save_every=config.checkpoint.every,
            save_at=config.checkpoint.at,
            evaluate=evaluation,
            evaluate_every=config.evaluate.every,
            stop=Stop(self.group.signals, limit),
            trace=(*config.profile_steps, self.run.profile) if config.profile_steps else None,
        )
        self.group.signals.defer()
        with barrier_at_exit(self.checkpoints, self.group.cleanup):
            try:
                state = fit(step, state, frozen, batches, until, mesh=self.group.mesh, rows=self.rows, hooks=hooks)
            except (Interrupted, Diverged) as e:
                self._event(self._logged, type(e).__name__.lower(), reason=str(e))
                self.exports.stop()
                raise
            last = int(state.step)
            if early := "" if last == config.steps else self._early(metrics):
                say(early)
                self.checkpoints.wait()
                self.exports.begin(last, last=True)
            self._event(last, "finished", **({"reason": early} if early else {}))
            return state

    def _log(self, metrics: Metrics, i: int, values: dict, data_state: dict) -> None:
        self.checkpoints.check()  # a save that failed in the background ends the run at the next step
        by_source = {f"tokens_{name}": count for name, count in data_state.get("tokens", {}).items() if name}
        if "rows" in data_state:  # of batches that are made from the state there are none to count
            values = {"tokens": data_state["rows"] * self._row_tokens} | values
        metrics.log_step(i, values | by_source)
        self._logged = i

    def _save(self, metrics: Metrics, i: int, state: TrainState, data_state: dict) -> None:
        self._retain(metrics)
        self._event(i, "saved")
        then = functools.partial(self.exports.begin, i)
        self.checkpoints.save(i, state, data_state, dict(leaves(self.config)), first=self.run.push_logs, then=then)

    def _evaluate(self, metrics: Metrics, evaluate: Callable, sample: Callable, i: int, state: TrainState) -> bool:
        """Evaluates a step; returns True where the run is to end with it."""
        with metrics.status("evaluating"):
            values = evaluate(state)
        metrics.log_evaluation(i, values)
        with metrics.status("writing a sample"):
            shown = sample(state)
        if isinstance(shown, str):
            shown = [{"prompt": self.config.generate.prompt[0], "text": shown}] if shown else []
        for one in shown:
            metrics.log_sample(i, **one)
        self._retain(metrics)  # decided after the evaluation, which may make this step one of the best
        self.report()
        return self._ends(metrics)

    def _ends(self, metrics: Metrics) -> bool:
        """True where the last evaluate.patience evaluations found no lower loss."""
        patience = self.config.evaluate.patience
        if not patience:
            return False
        return broadcast_from_main("ends", is_main_process() and metrics.file.evaluations_since_best()[0] >= patience)

    def _early(self, metrics: Metrics) -> str:
        """The reason for an end before config.steps."""
        if not is_main_process():
            return ""
        count, best = metrics.file.evaluations_since_best()
        return (
            f"ended before step {self.config.steps:,}: {count} evaluations in a row found no eval_loss below that of "
            f"step {best['step']:,}, {best['eval_loss']:.4f} (evaluate.patience)"
        )

    def _event(self, step: int, kind: str, **more: Any) -> None:
        if is_main_process():
            write_event(self.run.events_path, step, kind, **more)

    def report(self) -> None:
        """Writes report.html, by the main process; where it can't be written, that is said once."""
        if is_main_process() and not self._no_report:
            try:
                write_page(self.run)
            except Exception as e:  # a page to look at may not end a run
                self._no_report = True
                say(f"warning: {self.run.report_path} can't be written ({one_line(e)}); the run goes on without it")

    def _retain(self, metrics: Metrics) -> None:
        self.checkpoints.wait()  # the save that it may refer to is on the disk
        if is_main_process():  # which has the metrics, and deletes
            best = metrics.file.best_steps(self.config.checkpoint.keep_best, among=self.checkpoints.steps())
            self.checkpoints.retain([*best, *self.exports.steps])


def once_a_step(write: Callable[[Any], str]) -> Callable[[TrainState], str]:
    """`write`, called with the weights to evaluate, whose text of a step is kept: the last is printed at the end."""
    texts: dict[int, str] = {}

    def sample(state: TrainState) -> str:
        step = int(state.step)
        if step not in texts:
            texts[step] = write(state.eval_params)
        return texts[step]

    return sample


def sample_settings(config: TrainConfig, size: int) -> GenerateConfig | None:
    """The settings by which the recipe's first prompt, of `size` tokens, is continued as far as the context allows.

    None where no sample is wanted.
    """
    room = config.data.length - size
    if config.sample and room < 1:
        say(f"no sample: generate.prompt fills the context of {config.data.length} tokens")
    if not config.sample or room < 1:
        return None
    prompt, most = config.generate.prompt[:1], min(room, config.generate.max_new_tokens)
    return dataclasses.replace(config.generate, prompt=prompt, max_new_tokens=most)


def print_sample(sampling: GenerateConfig | None, text: str, between: str = "") -> None:
    """Prints the last sample, so that the first thing that a newcomer sees of a model is text."""
    if sampling and text and is_main_process():
        print(f"\nsample of {sampling.max_new_tokens} tokens:\n{sampling.prompt[0]}{between}{text}\n", flush=True)


def load_frozen(runs: Mapping[str, str], mesh: MeshConfig) -> dict[str, Any]:
    """The weights of other runs by name (a reference policy, a reward model), for a step's `frozen` argument.

    They are restored sharded over the mesh, are not donated, and are never saved with the run that is trained.
    """
    return {name: load_model(run_dir, mesh).params for name, run_dir in runs.items()}


@contextlib.contextmanager
def barrier_at_exit(checkpoints: Checkpoints, cleanup: contextlib.ExitStack) -> Generator[None]:
    """Keeps every process until all have saved and closed, where all come to the block's end at the same step.

    Any exception but Interrupted and Diverged may be one process's alone, and the others would never come.
    """
    common = None
    try:
        yield
    except (Interrupted, Diverged) as e:
        common = e
    checkpoints.wait()
    cleanup.close()
    barrier("closed")
    if common is not None:
        raise common

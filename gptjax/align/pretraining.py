"""Pretraining text beside a stage's own data: rows whose language-model loss is added to the stage's (PPO-ptx)."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from gptjax.config import DataConfig, PpoConfig, TrainConfig, TuneConfig
from gptjax.config.section import InputError
from gptjax.data.batches import DataState
from gptjax.data.packing import Batch, example_batch
from gptjax.data.prepared import PreparedData, open_corpora
from gptjax.evals.loss import evaluate, make_eval_step
from gptjax.model.decoder import Decoder, Params
from gptjax.parallel.processes import say
from gptjax.parallel.sharding import LocalRows, abstract
from gptjax.runs.run import Run, load_config
from gptjax.tokenizer import Tokenizer
from gptjax.training.step import TrainState

INIT = "init"  # a source that stands for the data of the run that config.init goes back to


def example_text(config: TrainConfig) -> Batch:
    """Names, shapes and types of the rows of text in a step's batch."""
    return _named(example_batch(config.data.batch_size, config.data.length))


def _named(batch: Batch) -> Batch:
    return {f"ptx_{name}": x for name, x in batch.items()}


class PretrainingText:
    """The rows of config.ptx.source, as many a step and as long as the stage's own, and a validation split.

    A text is prepared into the run's folder. Raises InputError where the source is not there, is read as a stream, or
    has another tokenizer.
    """

    def __init__(self, config: PpoConfig, run: Run, tokenizer: Tokenizer, *, resumes: bool):
        source, folder = config.ptx.source, run.data
        data, mine = DataConfig(source=source), source != INIT
        if not mine:
            root, at = load_config(config.init), config.init
            while isinstance(root, TuneConfig):
                if root.from_scratch:
                    raise InputError(f"ptx.source='init': {at} began from random weights, with no text; give one")
                root, at = load_config(root.init), root.init
            data, folder = root.data, Run.at(at).data
            if data.loading == "stream":
                raise InputError(
                    f"ptx.source='init': {at} was trained on a stream, whose rows can't be read again; give a text or "
                    "a prepared folder: --ptx.source PATH"
                )
        rows = {"batch_size": config.data.batch_size, "length": config.data.length, "validation": (), "workers": 0}
        given = TrainConfig(
            run_dir=config.run_dir,
            steps=config.steps,
            seed=config.seed,
            tokenizer=config.tokenizer,
            data=dataclasses.replace(data, **rows),
        )
        try:
            self.data = PreparedData(open_corpora(given, folder, mine, mine and resumes, say), given, mine, say)
        except InputError as e:
            raise InputError(f"ptx.source={source!r}: {e}") from e
        if self.data.tokenizer.sha256 != tokenizer.sha256:
            raise InputError(
                f"ptx.source={source!r} was prepared with another tokenizer than that of init={config.init!r}; give "
                f"its text, or prepare it with --tokenizer.path of that run"
            )
        self._config, self._step = config, None

    def evaluate(self, decoder: Decoder, params: Params, mesh: Mesh) -> dict[str, float]:
        """eval_loss_ptx, the loss of whole weights on the validation split in nats a token."""
        if self._step is None:
            rows = abstract(example_batch(self._config.data.batch_size, self._config.data.length), mesh)
            self._step = make_eval_step(decoder, mesh, params, rows)
        most = self._config.evaluate.max_rows
        return {"eval_loss_ptx": evaluate(self._step, params, self.data.validation, most, mesh)["eval_loss"]}


class WithText:
    """Batches as a function of the state, with rows of text as ptx_... in them; their state is "ptx" in the data's."""

    def __init__(
        self,
        batches: Callable[[TrainState], tuple[Batch, DataState]],
        text: PretrainingText,
        cursor: DataState,
        rows: LocalRows,
    ):
        self._batches, self._cursor = batches, cursor["ptx"]
        self._text: Any = text.data.batches(self._cursor, rows.numbers)

    def __call__(self, state: TrainState) -> tuple[Batch, DataState]:
        batch, cursor = self._batches(state)
        rows, self._cursor = next(self._text)
        return batch | _named(rows), {**cursor, "ptx": self._cursor}

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._text.close()

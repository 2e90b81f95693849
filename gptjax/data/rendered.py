"""Records of a fine-tuning stage: their files, the tokenizer that renders them, the share that is held out."""

import hashlib
import math
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import TuneConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice
from gptjax.data.dialogue import Messages
from gptjax.data.formats import kind_of
from gptjax.data.holdout import unit_hash
from gptjax.data.image_messages import pictures_of
from gptjax.data.packing import Batch
from gptjax.data.sources import source_paths
from gptjax.data.validation import another_source, data_changed
from gptjax.tokenizer import (
    META_FILE,
    BytesTokenizer,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    open_tokenizer,
    set_template,
)
from gptjax.tokenizer.known_templates import TEMPLATES


class RecordData:
    """The part of a pipeline's data that conversations, preferences and prompts have alike: records as rendered.

    A subclass lays those that are trained on out as `train`, with num_rows and batch(first, size), and calls `begin`
    with the content of all. Rows are counted in state["rows"].
    """

    train: Any
    start: DataState
    """The state of the data before the first batch."""

    def __init__(self, config: TuneConfig, tokenizer: Tokenizer, training: bool):
        self.config, self.tokenizer, self.training = config, tokenizer, training
        self.validation: list[Any] = []
        """The sets of text that are held out."""

    def begin(self, content: Iterable[bytes]) -> None:
        """Makes `start` from the records as rendered: by their digest a run that goes on finds that they changed."""
        digest = hashlib.sha256()
        for part in content:
            digest.update(part)
        self.start = {"rows": 0, "source": self.config.data.source, "content": digest.hexdigest()}

    @property
    def epoch_rows(self) -> int:
        """The rows of an epoch, of which data.batch_size make a step."""
        return self.train.num_rows

    @property
    def steps(self) -> int:
        """The steps of the settings, or of their epochs."""
        rows = self.config.epochs * self.epoch_rows
        return self.config.steps or max(1, math.ceil(rows / self.config.data.batch_size))

    @property
    def passes(self) -> str:
        """The end of `describe`: the steps and their epochs."""
        epochs = self.steps * self.config.data.batch_size / self.epoch_rows
        return f"{self.steps:,} steps are {epochs:.3g} epochs"

    def check(self, state: DataState) -> None:
        """Raises InputError where a checkpoint's state of the data is not one of these records as rendered."""
        if state["content"] != self.start["content"]:
            where = f"{another_source(self.config.data.source, state['source'])}, or the template is"
            raise data_changed(where, self.config, self.training)

    def batches(self, state: DataState, part: RowSlice = ALL_ROWS) -> Generator[tuple[Batch, DataState], None, None]:
        """Yields (some rows of a batch, state after it) from a state on, without end."""
        while True:
            batch = self.batch(state["rows"], part)
            state = {**state, "rows": state["rows"] + self.config.data.batch_size}
            yield batch, state

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The batch that begins with row `first`, or some of its rows."""
        return {n: x[part] for n, x in self.train.batch(first, self.config.data.batch_size).items()}

    def sources(self, first: int) -> list[str]:
        """The name of the source of each row: it has none, there is one."""
        del first
        return [""] * self.config.data.batch_size


def record_files(source: str, what: str) -> list[Path]:
    """The files of records of a source: itself, or those in its folder. Raises InputError where it has none.

    `what` names the records for messages: conversations, prompts.
    """
    paths, _ = source_paths(source)
    records = [path for path in paths if kind_of(path) != "text"]
    if not records:
        raise InputError(
            f"data.source={source!r} holds no {what}; wanted a file .jsonl, .jsonl.gz, .jsonl.zst or .parquet "
            f"with {what}, or a folder of them: --data.source FILE"
        )
    return records


def tuned_tokenizer(config: TuneConfig, kept: Path | None = None) -> Tokenizer:
    """The tokenizer of the settings, or the one that a run has in the folder `kept`, with the template that is named.

    Raises InputError where it lacks a token of that template.
    """
    cfg = config.tokenizer
    if kept is not None and (kept / META_FILE).exists():
        tokenizer = load_tokenizer(kept)
    elif config.from_scratch:
        tokenizer = make_tokenizer(cfg, iter(()))
    else:
        tokenizer = BytesTokenizer() if cfg.kind == "bytes" else open_tokenizer(cfg.path, cfg.kind, cfg.pattern)
    set_template(tokenizer, cfg.template)
    return tokenizer


def chat_tokenizer(config: TuneConfig, kept: Path | None = None) -> Tokenizer:
    """The tokenizer of the settings or of a run, see `tuned_tokenizer`; raises InputError where it has no template."""
    tokenizer = tuned_tokenizer(config, kept)
    if not tokenizer.template:
        raise InputError(
            f"init={config.init!r}: its tokenizer has no chat template; name one with --tokenizer.template, one of "
            f"{', '.join(TEMPLATES)}"
        )
    return tokenizer


def held_out(
    hashes: np.ndarray, usable: np.ndarray, fraction: float, source: str, what: str = "conversations"
) -> np.ndarray:
    """True for each conversation whose hash is at most a threshold: the fraction, so that more change no other's split.

    Where that holds out none of those that are usable, or all of them, it is the lowest, or the one below the highest.
    Raises InputError unless some are usable, with two different questions.
    """
    known = np.unique(hashes[usable])
    if len(known) < 2:
        raise InputError(
            f"data.source={source!r}: {int(usable.sum())} of {len(usable)} {what} fit and have an answer, with "
            f"{len(known)} different questions; wanted at least two, one to hold out; raise --data.length or give more"
        )
    return hashes <= min(max(fraction, known[0]), known[-2])


def question_hash(messages: Messages) -> float:
    """A number from 0 to 1 of the first image, or else the first message of a user, by which it is held out."""
    if pictures := pictures_of(messages):
        return unit_hash(bytes.fromhex(pictures[0].key))
    asked = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
    return unit_hash(hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest())

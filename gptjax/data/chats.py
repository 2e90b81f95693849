"""Conversations as the data of a run: rendered by the tokenizer's template, a share of them held out, packed whole."""

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np

from gptjax.config import SftConfig, TuneConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice
from gptjax.data.dialogue import ConversationRows, Messages, Rendered, fits, is_answered, messages_of, tools_of
from gptjax.data.formats import kind_of, read_records
from gptjax.data.holdout import unit_hash
from gptjax.data.packing import Batch
from gptjax.data.sources import source_paths
from gptjax.data.validation import another_source, data_changed
from gptjax.tokenizer import META_FILE, BytesTokenizer, Tokenizer, load_tokenizer, open_tokenizer, set_template
from gptjax.tokenizer.known_templates import TEMPLATES, template_of


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


class ChatData:
    """The conversations of a source, to train on and held out, with the methods of a pipeline's data.

    A conversation is held out by a hash of its first message of a user, so that equal questions stay together and the
    order of the file does not matter. `folder` is the run's; its tokenizer lies beside it once it was begun. Raises
    InputError for records of another form, and where there is nothing to learn or to hold out.
    """

    def __init__(self, config: SftConfig, folder: Path, training: bool):
        self._config, self._training = config, training
        self.tokenizer = chat_tokenizer(config, folder.with_name("tokenizer"))
        template = template_of(self.tokenizer)
        rendered, questions = [], []
        for path in record_files(config.data.source, "conversations"):
            for origin, record in read_records(path):
                messages = messages_of(record, origin)
                try:
                    rendered.append(template.render(self.tokenizer, messages, tools=tools_of(record, origin)))
                except InputError as e:
                    raise InputError(f"{origin}: {e}") from e
                questions.append(question_hash(messages))
        length = config.data.length
        usable = [fits(pair, length) and is_answered(pair) for pair in rendered]
        held = held_out(np.array(questions), np.array(usable), config.data.validation_fraction, config.data.source)
        self.train = ConversationRows([p for p, h in zip(rendered, held) if not h], length, config.seed)
        self.held = HeldOut(config, [p for p, h in zip(rendered, held) if h], self.tokenizer)
        self._counts = sum(usable) - int(held[usable].sum()), int(held[usable].sum())
        self.validation = [self.held]
        content = hashlib.sha256()
        for ids, weights in rendered:
            content.update(np.array([len(ids), *ids, *weights], np.int32).tobytes())
        self.start: DataState = {"rows": 0, "source": config.data.source, "content": content.hexdigest()}

    @property
    def steps(self) -> int:
        """The steps of the settings, or of their epochs."""
        rows = self._config.epochs * self.train.num_rows
        return self._config.steps or max(1, math.ceil(rows / self._config.data.batch_size))

    def check(self, state: DataState) -> None:
        """Raises InputError where a checkpoint's state of the data is not one of these conversations as rendered."""
        if state["content"] != self.start["content"]:
            raise data_changed(
                f"{another_source(self._config.data.source, state['source'])}, or the template is",
                self._config,
                self._training,
            )

    def batches(self, state: DataState, part: RowSlice = ALL_ROWS) -> Generator[tuple[Batch, DataState], None, None]:
        """Yields (some rows of a batch, state after it) from a state on, without end."""
        while True:
            batch = self.batch(state["rows"], part)
            state = {**state, "rows": state["rows"] + self._config.data.batch_size}
            yield batch, state

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The batch that begins with row `first`, or some of its rows."""
        return {n: x[part] for n, x in self.train.batch(first, self._config.data.batch_size).items()}

    def sources(self, first: int) -> list[str]:
        """The name of the source of each row: it has none, there is one."""
        del first
        return [""] * self._config.data.batch_size

    def describe(self) -> str:
        """The numbers of conversations and rows, and of those that were left out, in a line."""
        train, held = self._counts
        long, none = (sum(getattr(x, n) for x in (self.train, self.held.rows)) for n in ("too_long", "unanswered"))
        left = [f"{long:,} of more than {self._config.data.length + 1:,} tokens"] if long else []
        left += [f"{none:,} without an answer"] if none else []
        passes = self.steps * self._config.data.batch_size / self.train.num_rows
        return (
            f"{train:,} conversations to train on in {self.train.num_rows:,} rows, {held:,} held out"
            f"{'; left out: ' * bool(left)}{', '.join(left)}; {self.steps:,} steps are {passes:.3g} epochs"
        )


class HeldOut:
    """The conversations that are held out, as an evaluation reads them: the loss on the assistant's tokens alone."""

    name, own = "", True

    def __init__(self, config: SftConfig, rendered: Sequence[Rendered], tokenizer: Tokenizer):
        self.config = config
        self.rows = ConversationRows(rendered, config.data.length)
        answers = [
            [i for i, weight in zip(ids[1:], weights[1:]) if weight]
            for ids, weights in rendered
            if fits((ids, weights), config.data.length)
        ]
        num_bytes = sum(len(tokenizer.decode_bytes(ids)) for ids in answers)
        self.bytes_per_target = num_bytes / sum(map(len, answers))

    def batches(self, max_rows: int, part: RowSlice = ALL_ROWS) -> Iterator[Batch]:
        """Yields the rows, or only the first max_rows of them (0: all), in batches, or some rows of each batch."""
        for batch in self.rows.in_order(self.config.data.batch_size, max_rows):
            yield {n: x[part] for n, x in batch.items()}


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
    """A number from 0 to 1 of the first message of a user, by which it is held out."""
    asked = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
    return unit_hash(hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest())

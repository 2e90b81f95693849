"""Training data that is tokenised while it is trained on: one stream of text, or a mixture of several."""

import atexit
import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Generator
from typing import BinaryIO

import numpy as np

from gptjax.config import TrainConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice, prefetch, row_numbers, slice_rows
from gptjax.data.chunks import StreamSpec
from gptjax.data.corpus import is_corpus
from gptjax.data.mixture import SourceSchedule, joined, parse_sources, rows_of_a_pass
from gptjax.data.packing import Batch
from gptjax.data.sources import open_source
from gptjax.data.stream import StreamRows, cursor_of, open_chunks, start_state
from gptjax.data.validation import (
    ValidationSet,
    data_changed,
    extra_validation_sets,
    refuse_code,
    row_tokens,
    tokenize_into_memory,
)
from gptjax.tokenizer import Tokenizer, make_tokenizer

VALIDATION_ROWS = 1024  # of a stream, where evaluate.max_rows is 0

_END_BYTES = 1 << 16  # of each end of a file, by which its content is told


class StreamedData:
    """The data of a run, read and tokenised as it is trained on.

    The state after some batches is {"step", "tokenizer", "sources", "content"}: for each source, by name ("" for a
    single one), where its next row begins, and what tells its content. A mixture's state has "tokens" too: the
    weighted targets trained on so far, by source. Where corrupt files were skipped, "corrupt" lists them. The batches
    that follow are the same for any number of workers.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None] | None = None):
        data, tokenizer = config.data, config.tokenizer
        self._config, self._training, self._say = config, say is not None, say or (lambda line: None)
        self._mixed = data.source == "mixture"
        sources = parse_sources(data.mixture) if self._mixed else {"": data.source}
        if tokenizer.kind != "bytes" and not tokenizer.path:
            source = next(iter(sources.values()))
            raise InputError(
                f"tokenizer.path is empty, and data.loading=stream needs a tokenizer that exists; run "
                f"`gptjax tokenizer train --source {source} --vocab-size {tokenizer.vocab_size} "
                f"--out FOLDER`, then add --tokenizer.path FOLDER/tokenizer.model"
            )
        if found := [source for source in sources.values() if is_corpus(source)]:
            raise InputError(f"{found[0]} is a prepared folder; train on it with --data.loading prepared")
        self.tokenizer: Tokenizer = make_tokenizer(tokenizer, iter(()))
        self._texts = {}
        for name, source in sources.items():
            source = source if self._training else refuse_code(source)
            self._texts[name] = StreamSpec(
                source, data.text_field, data.validation_fraction, data.max_corrupt, tokenizer
            )
        self._schedule = SourceSchedule(rows_of_a_pass(data, [(1, 1)] * len(sources)))

    @functools.cached_property
    def validation(self) -> list[ValidationSet]:
        """The held-out documents of each source, and the sets of data.validation, in memory.

        Held out are the documents whose hash is at most data.validation_fraction, as in a prepared corpus; of them as
        many, from the start of the source, as evaluate.max_rows rows need, or VALIDATION_ROWS. They are tokenised
        anew at each start, for which the source is read until they are found.
        """
        most = row_tokens(self._config) or VALIDATION_ROWS * self._config.data.length + 1
        own, cut = [], []
        for name, text in self._texts.items():
            split = tokenize_into_memory(text.documents(), self.tokenizer, most)
            if not split.num_documents:
                raise InputError(
                    f"source {text.source!r} has no document that is held out for validation; give more documents, "
                    f"raise data.validation_fraction={text.held_out:g}, or prepare it: --data.loading prepared"
                )
            own.append(ValidationSet(name, split, self._config))
            cut += [text.source] if split.num_tokens >= most else []
        if cut and not self._config.evaluate.max_rows:
            self._say(
                f"of what {', '.join(cut)} hold{'s' if len(cut) == 1 else ''} out, the first {VALIDATION_ROWS:,} rows "
                f"are evaluated, as of every stream; set --evaluate.max-rows for more"
            )
        return own + extra_validation_sets(self._config, self.tokenizer, self._training)

    @functools.cached_property
    def start(self) -> DataState:
        """The state before the first batch."""
        state = {
            "step": 0,
            "tokenizer": self.tokenizer.sha256,
            "sources": {name: start_state() for name in self._texts},
            "content": {name: content(text) for name, text in self._texts.items()},
        }
        return state | ({"tokens": dict.fromkeys(self._texts, 0)} if self._mixed else {})

    def check(self, state: DataState) -> None:
        """Raises InputError where a checkpoint's state of the data is not one of this data.

        A source with another content is let through without data.exact_resume: the stream goes on at the same file
        and document number, or with the next pass where there is none.
        """
        if state["tokenizer"] != self.tokenizer.sha256:
            what = f"tokenizer.path={self._config.tokenizer.path!r} is not the tokenizer that this run was trained with"
            raise data_changed(what, self._training)
        for name, text in self._texts.items():
            if state["content"][name] == self.start["content"][name]:
                continue
            if self._config.data.exact_resume:
                what = (
                    f"source {text.source!r} is not what this run was trained on: a file was changed, added or removed"
                )
                raise data_changed(what, self._training, "go on inexactly with --no-data.exact-resume")
            at = state["sources"][name]
            self._say(
                f"source {text.source!r} changed: going on at document {at['document'] + 1} of file {at['unit'] + 1} "
                f"in pass {at['epoch'] + 1}, so that text may be missed or seen again"
            )

    def batches(self, state: DataState, rows: RowSlice = ALL_ROWS) -> Generator[tuple[Batch, DataState], None, None]:
        """Yields (some rows of a batch, state after it) from a state on, without end; a thread packs the next ones.

        All of the text is tokenised whatever the rows: where one begins is known only by the tokens before it. So each
        of several hosts does the work of one. Closing it ends the thread and the workers.
        """
        made = self._made(state, self._config.data.workers)
        packed = prefetch(itertools.repeat(functools.partial(next, made)))
        atexit.register(made.close)  # a stream that nobody closed must end before the modules that it needs
        try:
            with contextlib.closing(made), contextlib.closing(packed):
                for batch, after in packed:
                    yield slice_rows(batch, rows), after
        finally:
            atexit.unregister(made.close)

    def batch(self, step: int, rows: RowSlice = ALL_ROWS) -> Batch:
        """The batch that is trained on after `step` steps, or some of its rows; the text before is tokenised again."""
        with contextlib.closing(self._made(self.start, 0)) as made:
            return slice_rows(next(itertools.islice(made, step, None))[0], rows)

    def sources(self, step: int) -> list[str]:
        """The name of the source of each row of a batch; none where there is only one."""
        source_B, _ = self._schedule.split(row_numbers(self._config.data, step))
        return [list(self._texts)[i] for i in source_B.tolist()] if self._mixed else []

    def passes(self, state: DataState) -> dict[str, float]:
        """How often each source has been passed whole, by name; "" is the name of a single one."""
        return {name: float(at["epoch"]) for name, at in state["sources"].items()}

    def describe(self) -> str:
        """A line that says what is read."""
        cfg = self._config.data
        how = f"by {cfg.workers} processes" + (" for each source" if self._mixed else "") if cfg.workers else "here"
        return (
            f"a stream of {', '.join(text.source for text in self._texts.values())}, tokenised {how}; "
            f"{cfg.batch_size * cfg.length:,} tokens a step"
        )

    def _made(self, state: DataState, workers: int) -> Generator[tuple[Batch, DataState], None, None]:
        cfg = self._config.data
        state = {**state, "content": self.start["content"]}
        with contextlib.ExitStack() as stack:
            sources = []
            for name, text in self._texts.items():
                chunks = open_chunks(text, cursor_of(state["sources"][name]), workers)
                sources.append(StreamRows(stack.enter_context(contextlib.closing(chunks)), state["sources"][name], cfg))
            while True:
                source_B, _ = self._schedule.split(row_numbers(cfg, state["step"]))
                counts = np.bincount(source_B, minlength=len(sources)).tolist()
                parts = {i: sources[i].take(count) for i, count in enumerate(counts) if count}
                state = self._after(state, sources, parts)
                yield joined(source_B, parts), state

    def _after(self, state: DataState, sources: list[StreamRows], parts: dict[int, Batch]) -> DataState:
        """The state after a batch that is made of these parts."""
        places, tokens, corrupt = {**state["sources"]}, {**state.get("tokens", {})}, [*state.get("corrupt", [])]
        for i, part in parts.items():
            name = list(self._texts)[i]
            places[name] = sources[i].state
            if self._mixed:
                tokens[name] += int(np.count_nonzero(part["weights_BL"]))
            for what in sources[i].corrupt:
                if what not in corrupt:
                    corrupt.append(what)
                    self._count_corrupt(corrupt)
        state = {**state, "step": state["step"] + 1, "sources": places}
        return state | ({"tokens": tokens} if tokens else {}) | ({"corrupt": corrupt} if corrupt else {})

    def _count_corrupt(self, corrupt: list[str]) -> None:
        most = self._config.data.max_corrupt
        if len(corrupt) > most:
            raise InputError(f"{len(corrupt)} corrupt files, data.max_corrupt={most}: {' | '.join(corrupt)}")
        self._say(f"left out {len(corrupt)} of at most data.max_corrupt={most} corrupt files: {corrupt[-1]}")


def content(text: StreamSpec) -> str:
    """What tells a source's content: a hash of its files' kinds, sizes and both ends; "" where it is no files.

    It is made at each start, so it does not read all of the text.
    """
    files = open_source(text.source, text.text_field).files
    total = hashlib.sha256()
    for kind, path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            total.update(f"{kind} {size}\n".encode())
            for at in (0, max(0, size - _END_BYTES)):
                total.update(_piece(file, at))
    return total.hexdigest() if files else ""


def _piece(file: BinaryIO, at: int) -> bytes:
    file.seek(at)
    return file.read(_END_BYTES)

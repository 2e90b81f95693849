"""Training data that is tokenised while it is trained on: streams of text in fixed proportions."""

import contextlib
import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable

import numpy as np

from gptjax.config import TrainConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice, row_numbers, slice_rows
from gptjax.data.chunks import StreamSpec, open_chunks
from gptjax.data.corpus import is_corpus
from gptjax.data.holdout import share_notice
from gptjax.data.mixture import SourceSchedule, join_rows, rows_of_a_pass
from gptjax.data.packing import Batch
from gptjax.data.prefetch import prefetch
from gptjax.data.sources import open_source
from gptjax.data.stream import StreamRows, cursor_of, start_state
from gptjax.data.validation import (
    ValidationSet,
    another_source,
    check_names,
    data_changed,
    extra_validation_sets,
    refuse_code,
    row_tokens,
    tokenize_into_memory,
)
from gptjax.tokenizer import Tokenizer, make_tokenizer

VALIDATION_ROWS = 1024  # of a stream, where evaluate.max_rows is 0

_SHARE_BYTES = 1 << 24  # of text that are read to know the share that is held out
_END_BYTES = 1 << 16  # of each end of a file, which its content is compared by


class StreamedData:
    """The data of a run, read and tokenised as it is trained on.

    The state after some batches is {"rows", "names", "tokenizer", "sources", "content", "tokens"}: the rows read, and
    by source what it was called when the run began, where its next row begins, a hash of its content, and the weighted
    targets trained on so far; a single source has the name "".
    Where corrupt files were skipped, "corrupt" lists them. The batches that follow are the same for any number of
    workers.
    """

    def __init__(self, config: TrainConfig, training: bool, say: Callable[[str], None]):
        data, tokenizer = config.data, config.tokenizer
        self._config, self._training, self._say = config, training, say
        sources = data.sources
        if tokenizer.kind != "bytes" and not tokenizer.path:
            source = next(iter(sources.values()))
            raise InputError(
                f"tokenizer.path is empty, and data.loading=stream needs a tokenizer that exists; run "
                f"`gptjax tokenizer train --source {source} --vocab-size {tokenizer.vocab_size} "
                f"--out FOLDER`, then add --tokenizer.path FOLDER/tokenizer.model"
            )
        if corpora := [source for source in sources.values() if is_corpus(source)]:
            raise InputError(f"{corpora[0]} is a prepared folder; train on it with --data.loading prepared")
        self.tokenizer: Tokenizer = make_tokenizer(tokenizer, iter(()))
        sources = {name: source if training else refuse_code(source) for name, source in sources.items()}
        settings = data.text_field, data.validation_fraction, data.max_corrupt, tokenizer
        self._specs = {name: StreamSpec(source, *settings) for name, source in sources.items()}
        for spec in self._specs.values() if training else ():
            for line in open_source(spec.source, spec.text_field).notes:
                say(f"{spec.source}: {line}")
        self._schedule = SourceSchedule(rows_of_a_pass(data, [(1, 1)] * len(sources)))

    @functools.cached_property
    def validation(self) -> list[ValidationSet]:
        """The held-out documents of each source, and the sets of data.validation, in memory.

        Held out is the source's own validation split, or the documents whose hash is at most data.validation_fraction,
        as in a large prepared corpus; of them as many, from the start of the source, as evaluate.max_rows rows need, or
        VALIDATION_ROWS. They are tokenised anew at each start, for which the source is read until they are found. A
        stream can't cut documents as a small prepared corpus does, since it does not know the size of its text.
        """
        most = row_tokens(self._config) or VALIDATION_ROWS * self._config.data.length + 1
        own, shortened = [], []
        for name, spec in self._specs.items():
            read: Counter[str] = Counter()
            held_out = spec.documents(read)
            split = tokenize_into_memory(held_out, self.tokenizer, most)
            if not split.num_documents:
                raise InputError(
                    f"source {spec.source!r} has no document that is held out for validation; give more documents, "
                    f"raise data.validation_fraction={spec.fraction:g}, or prepare it: --data.loading prepared"
                )
            while read["read"] < _SHARE_BYTES and next(held_out, None):
                pass
            if read["read"] < _SHARE_BYTES:  # all of it was read: only of a small text the share may be far off
                for line in share_notice(read["held out"], read["read"], spec.fraction):
                    self._say(f"{spec.source}: {line}; --data.loading prepared holds out the asked share")
            own.append(ValidationSet(name, split, self._config))
            shortened += [spec.source] if split.num_tokens >= most else []
        if shortened and not self._config.evaluate.max_rows:
            self._say(
                f"of what {', '.join(shortened)} hold{'s' if len(shortened) == 1 else ''} out, the first "
                f"{VALIDATION_ROWS:,} rows are evaluated, as of every stream; set --evaluate.max-rows for more"
            )
        return own + extra_validation_sets(self._config, self.tokenizer, self._training)

    @functools.cached_property
    def start(self) -> DataState:
        """The state before the first batch."""
        return {
            "rows": 0,
            "names": {name: spec.source for name, spec in self._specs.items()},
            "tokenizer": self.tokenizer.sha256,
            "sources": {name: start_state() for name in self._specs},
            "content": {name: ends_hash(spec) for name, spec in self._specs.items()},
            "tokens": dict.fromkeys(self._specs, 0),
        }

    def check(self, state: DataState) -> None:
        """Raises InputError where a checkpoint's state of the data is not one of this data.

        A source with another content is let through without data.exact_resume: the stream goes on at the same file
        and document number, or with the next pass where there is none.
        """
        if state["tokenizer"] != self.tokenizer.sha256:
            path = self._config.tokenizer.path
            message = f"tokenizer.path={path!r} is not the tokenizer that this run was trained with"
            raise data_changed(message, self._config, self._training)
        check_names(state["names"], self._config, self._training)
        for name, spec in self._specs.items():
            if state["content"][name] == self.start["content"][name]:
                continue
            if self._config.data.exact_resume:
                message = another_source(spec.source, state["names"][name])
                raise data_changed(message, self._config, self._training, "go on inexactly: --no-data.exact-resume")
            cursor = cursor_of(state["sources"][name])
            self._say(
                f"source {spec.source!r} changed: going on at document {cursor.document + 1} of file "
                f"{cursor.file + 1} in pass {cursor.epoch + 1}, so that text may be missed or seen again"
            )

    def batches(self, state: DataState, part: RowSlice = ALL_ROWS) -> Generator[tuple[Batch, DataState], None, None]:
        """Yields (some rows of a batch, state after it) from a state on, without end; a thread packs the next ones.

        All of the text is tokenised whatever the rows: where one begins is known only by the tokens before it. So each
        of several hosts does the work of one. Closing it ends the thread and the workers.
        """
        steps = self._steps(state, self._config.data.workers, itertools.repeat(self._config.data.batch_size))
        packed = prefetch(itertools.repeat(functools.partial(next, steps)))
        with contextlib.closing(steps), contextlib.closing(packed):
            for batch, after in packed:
                yield slice_rows(batch, part), after

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The batch that begins with row `first`, or some of its rows; the text before is tokenised again."""
        size = self._config.data.batch_size
        before = [size] * (first // size) + [first % size] * (first % size > 0)
        with contextlib.closing(self._steps(self.start, 0, [*before, size])) as steps:
            return slice_rows(next(itertools.islice(steps, len(before), None))[0], part)

    def sources(self, first: int) -> list[str]:
        """The name of the source of each row of a batch."""
        source_B, _ = self._schedule.assign(row_numbers(self._config.data, first))
        return [list(self._specs)[i] for i in source_B.tolist()]

    def describe(self) -> str:
        """The sources in a line, and the processes that tokenise them."""
        cfg = self._config.data
        by = f"by {cfg.workers} processes for each source" if cfg.workers else "here"
        return f"a stream of {', '.join(spec.source for spec in self._specs.values())}, tokenised {by}"

    def _steps(
        self, state: DataState, workers: int, sizes: Iterable[int]
    ) -> Generator[tuple[Batch, DataState], None, None]:
        """Batches of so many rows each, one after the other."""
        cfg = self._config.data
        state = {**state, "content": self.start["content"]}
        with contextlib.ExitStack() as stack:
            streams = []
            for name, spec in self._specs.items():
                chunks = open_chunks(spec, cursor_of(state["sources"][name]), workers)
                streams.append(StreamRows(stack.enter_context(contextlib.closing(chunks)), state["sources"][name], cfg))
            for size in sizes:
                source_B, _ = self._schedule.assign(state["rows"] + np.arange(size))
                counts = np.bincount(source_B, minlength=len(streams)).tolist()
                parts = {i: streams[i].take(count) for i, count in enumerate(counts) if count}
                state = self._advance(state, streams, parts) | {"rows": state["rows"] + size}
                yield join_rows(source_B, parts), state

    def _advance(self, state: DataState, streams: list[StreamRows], parts: dict[int, Batch]) -> DataState:
        """The state after a batch that is made of these parts."""
        cursors, tokens, corrupt = {**state["sources"]}, {**state["tokens"]}, [*state.get("corrupt", [])]
        for i, part in parts.items():
            name = list(self._specs)[i]
            cursors[name] = streams[i].state
            tokens[name] += int(np.count_nonzero(part["weights_BL"]))
            for line in streams[i].corrupt:
                if line not in corrupt:
                    corrupt.append(line)
                    self._count_corrupt(corrupt)
        state = {**state, "sources": cursors, "tokens": tokens}
        return state | ({"corrupt": corrupt} if corrupt else {})

    def _count_corrupt(self, corrupt: list[str]) -> None:
        most = self._config.data.max_corrupt
        if len(corrupt) > most:
            raise InputError(f"{len(corrupt)} corrupt files, data.max_corrupt={most}: {' | '.join(corrupt)}")
        self._say(f"left out {len(corrupt)} of at most data.max_corrupt={most} corrupt files: {corrupt[-1]}")


def ends_hash(spec: StreamSpec) -> str:
    """A hash of a source's content: its files' kinds, sizes and both ends; "" where it is no files.

    It is made at each start, so it does not read all of the text.
    """
    files = open_source(spec.source, spec.text_field).paths
    total = hashlib.sha256()
    for kind, path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            total.update(f"{kind} {size}\n".encode())
            for start in (0, max(0, size - _END_BYTES)):
                file.seek(start)
                total.update(file.read(_END_BYTES))
    return total.hexdigest() if files else ""

"""Validation sets: the splits that a run holds out, and further texts that it is measured on."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from gptjax.config import TrainConfig
from gptjax.config.data import parse_sources
from gptjax.config.plugins import is_registered
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, RowSlice, TokenSplit, validation_batches
from gptjax.data.corpus import is_corpus, open_corpus
from gptjax.data.encode import Encoder, segments_of
from gptjax.data.formats import Document
from gptjax.data.packing import Batch, MemorySplit
from gptjax.data.sources import documents, is_function, open_source
from gptjax.tokenizer import Tokenizer

_BATCH = 64  # segments of text tokenised at a time


class TextSplit(TokenSplit, Protocol):
    """A split with the size of its text."""

    num_bytes: int
    num_documents: int


class MeasuredSet(Protocol):
    """The parts of a validation set that an evaluation reads: see ValidationSet."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> TrainConfig: ...
    @property
    def own(self) -> bool: ...
    @property
    def bytes_per_target(self) -> float: ...
    def batches(self, max_rows: int, part: RowSlice = ALL_ROWS) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class ValidationSet:
    """A validation set: its batches in order, and the bytes of text that a predicted token stands for."""

    name: str  # "" for the split of a single source
    split: TextSplit
    config: TrainConfig
    own: bool = True  # part of the run's own validation split, which eval_loss is about

    def batches(self, max_rows: int, part: RowSlice = ALL_ROWS) -> Iterator[Batch]:
        """Yields the rows, or only the first max_rows of them (0: all), in batches, or some rows of each batch."""
        return validation_batches(self.split, self.config.data, max_rows, part)

    @property
    def bytes_per_target(self) -> float:
        """Each document is stored as beginning, text, end; a beginning is predicted only across documents."""
        cfg = self.config.data
        crossing = cfg.cross_documents and cfg.packing == "packed"
        return self.split.num_bytes / (self.split.num_tokens - (1 if crossing else self.split.num_documents))


def data_changed(what: str, config: TrainConfig, training: bool, then: str = "") -> InputError:
    """The refusal of a run's checkpoint: the difference, and for a run that goes on the other ways out."""
    ways = ["restore it", *([then] if then else []), another_run(config)] if training else ["restore it"]
    return InputError(f"{what}; {', or '.join(ways)}")


def another_source(source: str, before: str) -> str:
    """The difference of a source's content to that of the source that a run was begun with."""
    if source == before:
        return f"source {source!r} is not what it was when this run was trained on it: its content was changed"
    return f"source {source!r} is not the one that this run was trained on, {before!r}: its content is another"


def another_run(config: TrainConfig) -> str:
    """The way out for a run whose data may not change: another one that begins with its weights."""
    return f"begin another run with its weights: --init {config.run_dir} --run-dir OTHER"


def check_names(names: Mapping[str, str], config: TrainConfig, training: bool) -> None:
    """Raises InputError unless a run has the sources by name, in their order, that its checkpoint has."""
    if list(names) != list(config.data.sources):
        was, got = (", ".join(x) or "one source" for x in (names, config.data.sources))
        raise data_changed(f"data.mixture was {was}, got {got}", config, training)


def refuse_code(source: str) -> str:
    """The source, for a verb that reads a run: what the run's settings name is not imported then."""
    if is_function(source) and not is_registered(source):
        raise InputError(
            f"source {source!r} is a function, and a verb that reads a run imports no code that the run names; "
            f"train with --data.loading prepared, which keeps its text"
        )
    return source


def extra_validation_sets(config: TrainConfig, tokenizer: Tokenizer, training: bool) -> list[ValidationSet]:
    """The validation sets of data.validation: the validation split of a folder or dataset that has one, or all text.

    A text is tokenised into memory at each start, as much of it as evaluate.max_rows rows need (0: all of it; 4 bytes
    a token). Raises InputError for a folder of another tokenizer, and for a function where this is not training.
    """
    sets = []
    for name, source in parse_sources(config.data.validation).items():
        if is_corpus(source):
            corpus = open_corpus(source)
            if corpus.manifest.tokenizer_sha256 != tokenizer.sha256:
                raise InputError(
                    f"data.validation {name}={source} was prepared with another tokenizer than this run's "
                    f"({corpus.manifest.tokenizer_sha256[:12]}, wanted {tokenizer.sha256[:12]}); prepare it with "
                    f"--tokenizer.path set to this run's"
                )
            split = corpus.split("validation")
        else:
            source = source if training else refuse_code(source)
            opened = open_source(source, config.data.text_field)
            if opened.has_validation:
                opened = replace(opened, files=tuple(file for file in opened.files if file.validation))
            split = tokenize_into_memory(documents(opened), tokenizer, row_tokens(config))
        if not split.num_documents or not split.num_bytes:
            raise InputError(f"data.validation {name}={source} holds no text; wanted at least one document with some")
        sets.append(ValidationSet(name, split, config, own=False))
    return sets


def row_tokens(config: TrainConfig) -> int:
    """Tokens that evaluate.max_rows rows need; 0: all there are."""
    return config.evaluate.max_rows * config.data.length + 1 if config.evaluate.max_rows else 0


def tokenize_into_memory(texts: Iterable[Document], tokenizer: Tokenizer, max_tokens: int = 0) -> MemorySplit:
    """The documents as a split in memory, up to the segment in which max_tokens are reached (0: all)."""
    encoder = Encoder(tokenizer)
    segments = (segment for text in texts for segment in segments_of(text, tokenizer))
    runs, starts, size, num_bytes = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], 0, 0
    while (not max_tokens or size < max_tokens) and (batch := list(itertools.islice(segments, _BATCH))):
        tokens, begins = encoder.tokenize(batch)
        runs.append(tokens)
        starts.append(begins + size)
        size, num_bytes = size + len(tokens), num_bytes + sum(segment.num_bytes for segment in batch)
    return MemorySplit(np.concatenate(runs), np.concatenate(starts), num_bytes)

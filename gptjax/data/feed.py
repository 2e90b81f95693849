"""What a run trains and evaluates on: batches that can go on exactly where they were, and the validation sets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import TrainConfig
from gptjax.data.batches import Rows, batches, validation_batches
from gptjax.data.corpus import Corpus, Split, is_corpus, open_corpus
from gptjax.data.packing import Batch
from gptjax.data.prepare import prepare
from gptjax.settings import InputError
from gptjax.tokenizer import Tokenizer

State = dict[str, Any]  # of the data after some batches; JSON, saved with the checkpoint of the last one trained on


@dataclass(frozen=True)
class Validation:
    """A validation set: its batches in order, and how many bytes of text a predicted token stands for."""

    name: str  # "" for the one split of a corpus
    split: Split
    config: TrainConfig
    own: bool = True  # part of the run's own validation split, which eval_loss is about

    def batches(self, max_rows: int) -> Iterator[Batch]:
        """Yields the rows, or only the first max_rows of them (0: all)."""
        return validation_batches(self.split, self.config.data, max_rows)

    @property
    def bytes_per_target(self) -> float:
        """Each document is stored as beginning, text, end; a beginning is predicted only across documents."""
        cfg = self.config.data
        crossing = cfg.cross_documents and cfg.packing == "packed"
        return self.split.num_bytes / (self.split.num_tokens - (1 if crossing else self.split.num_documents))


class Feed:
    """The data of a run, from a prepared corpus: which rows a step reads is a pure function of the step."""

    def __init__(self, corpus: Corpus, config: TrainConfig):
        self._corpus, self._config = corpus, config
        self._rows = Rows(corpus.split("train"), config.data, config.seed)
        self.validation = [Validation("", corpus.split("validation"), config)]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._corpus.tokenizer

    @property
    def start(self) -> State:
        """The state before the first batch."""
        return {"step": 0, "corpus": self._corpus.sha256}

    def check(self, state: State) -> None:
        """Raises InputError where a checkpoint's state of the data is not one of this data."""
        if state["corpus"] != self._corpus.sha256:
            raise InputError(
                f"{self._corpus.folder} is not the corpus that this run was trained on; "
                f"restore it, or give another --run-dir"
            )

    def batches(self, state: State) -> Iterator[tuple[Batch, State]]:
        """Yields (batch, state after it) from a state on, without end."""
        for batch, after in batches(self._rows, state["step"]):
            yield batch, {**state, **after}

    def batch(self, step: int) -> Batch:
        """The batch that is trained on after `step` steps."""
        return self._rows.batch(step)

    def describe(self) -> str:
        """A line that says how much there is."""
        cfg, train, held = self._config.data, self._corpus.split("train"), self._corpus.split("validation")
        return (
            f"{train.num_tokens:,} tokens to train on, {held.num_tokens:,} held out; "
            f"{cfg.batch_size * cfg.length:,} tokens a step"
        )


def open_feed(config: TrainConfig, folder: Path, say: Callable[[str], None] | None = None) -> Feed:
    """The data of a run: a prepared corpus, or text that is prepared into `folder`.

    Training gives `say`, for lines that tell what is done; without it nothing is prepared, only opened. Raises
    InputError where the data is not there or is not of this run's settings.
    """
    source, wanted = config.data.source, config.tokenizer.vocab_size
    if is_corpus(source):
        corpus = open_corpus(source)
    elif say is None:
        corpus = open_corpus(folder)
    else:
        if not is_corpus(folder):
            say(f"preparing {source} with a tokenizer of {wanted:,} ids into {folder}")
        corpus = prepare(source, folder, config.tokenizer, config.data.validation_fraction)
    if corpus.vocab_size != wanted:
        raise InputError(
            f"{corpus.folder} was prepared with {corpus.vocab_size} token ids but tokenizer.vocab_size={wanted}; "
            f"set --tokenizer.vocab-size {corpus.vocab_size}, or prepare the text again"
        )
    return Feed(corpus, config)

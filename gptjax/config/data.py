"""Settings of the data: sources of text, its preparation and its rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gptjax.config.section import Section
from gptjax.config.tokenizer import SourceConfig, TokenizerConfig


def parse_sources(entries: Sequence[str]) -> dict[str, str]:
    """NAME=SOURCE entries as {name: source}, in their order."""
    return {name: source for name, _, source in (entry.partition("=") for entry in entries)}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Sources of the text, and its rows."""

    section: ClassVar[str] = "data"

    source: str = "builtin:shakespeare"
    """A text file, .jsonl(.gz, .zst), .parquet, a folder of them, a folder made by `gptjax prepare` or save_to_disk,
    builtin:shakespeare, `tfds:NAME[:SPLIT]`, `hf:NAME[@CONFIG][:SPLIT]`, a function module:name, or mixture: those that
    data.mixture lists."""
    mixture: tuple[str, ...] = ()
    """The sources of a mixture, each as NAME=SOURCE; NAME is what its losses and token counts are called."""
    weights: tuple[float, ...] = ()
    """One number for each source of the mixture; none: each is passed once in a pass over the mixture."""
    weights_are: Literal["epochs", "shares"] = "epochs"
    """Passes over each source in one pass over the mixture, or its share of the tokens."""
    validation: tuple[str, ...] = ()
    """Further validation sets, each as NAME=SOURCE (its validation split if it has one, else its whole text)."""
    text_field: str = "text"
    """Name of the text in records of JSONL, Parquet, TFDS and Hugging Face datasets."""
    loading: Literal["prepared", "stream"] = "prepared"
    """Tokenise everything first and read at random, or tokenise while training, in the source's order."""
    workers: int = 0
    """Processes that tokenise a stream (for each source of a mixture), or threads that cut rows of a prepared corpus;
    0: one thread. Their number changes no batch, so it may differ on resume."""
    exact_resume: bool = True
    """Refuse to resume where the data can't go on exactly where it was: a stream whose source was changed."""
    max_corrupt: int = 0
    """Corrupt files or pages that may be skipped and counted; with one more, or with 0, training stops and names it."""
    batch_size: int = 16
    """Rows a step, over all devices and accumulated micro-batches together."""
    length: int = 256
    """Tokens a row; also the context that the model is built for."""
    validation_fraction: float = 0.05
    """Share of the bytes that is held out and never trained on, where the source has no validation split of its own."""
    packing: Literal["packed", "padded"] = "packed"
    """Rows filled with documents end to end, or one document (or a slice of it) a row, padded."""
    cross_documents: bool = False
    """Let attention cross from one packed document into the next."""

    def __post_init__(self):
        self.require(bool(self.source), "source", "a path or a name", "give --data.source FILE")
        self.require_positive("batch_size", "length")
        few = self.batch_size * self.length < 2**31
        self.require(few, "batch_size", f"fewer than 2^31 tokens a step, with data.length={self.length}")
        self.require_numbers(0, math.inf, "workers", "max_corrupt")
        mixed = self.source == "mixture"
        then = "set --data.source mixture and --data.mixture NAME=SOURCE NAME=SOURCE ..."
        self.require(mixed == bool(self.mixture), "mixture", "sources where data.source is mixture, else none", then)
        for name in ("mixture", "validation"):
            pairs = [entry.partition("=") for entry in getattr(self, name)]
            form = all(n.isidentifier() and s for n, _, s in pairs)
            self.require(form, name, "NAME=SOURCE entries whose names are letters, digits and _")
            self.require(len({n for n, _, _ in pairs}) == len(pairs), name, "names that differ")
        twice = {n.partition("=")[0] for n in self.mixture} & {n.partition("=")[0] for n in self.validation}
        self.require(not twice, "validation", "names that no source of data.mixture has")
        shares = self.weights_are == "epochs" or bool(self.weights)
        self.require(shares, "weights", "one for each source where data.weights_are is shares")
        given = not self.weights or len(self.weights) == len(self.mixture)
        self.require(given, "weights", f"one for each of the {len(self.mixture)} sources in data.mixture")
        self.require(all(math.isfinite(w) and w > 0 for w in self.weights), "weights", "finite numbers above 0")
        shares = not mixed or self.loading == "prepared" or (self.weights and self.weights_are == "shares")
        then = "give --data.weights, or --data.loading prepared"
        self.require(bool(shares), "weights_are", "shares, and data.weights, for a stream: its size is not known", then)
        self.require(0 < self.validation_fraction < 1, "validation_fraction", "a share above 0 and below 1")

    @property
    def sources(self) -> dict[str, str]:
        """The sources by name: those of the mixture, or the one source under the empty name."""
        return parse_sources(self.mixture) if self.mixture else {"": self.source}

    @property
    def several_documents(self) -> bool:
        """Attention needs segments: a row may hold several documents that do not see each other, or a skipped page."""
        return (self.packing == "packed" and not self.cross_documents) or self.max_corrupt > 0


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SourceConfig):
    """Tokenise a source into a folder that training reads at random."""

    out: str = "corpus"
    """Folder to make."""
    deduplicate: bool = True
    """Keep one of several documents with exactly the same text; the report counts the others."""
    min_bytes: int = 1
    """Leave out documents shorter than this, in UTF-8; the report counts them."""
    max_bytes: int = 0
    """Leave out documents longer than this, in UTF-8; 0: none."""
    workers: int = 0
    """Processes that tokenise; 0: one for each core."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self):
        super().__post_init__()
        self.require_numbers(0, math.inf, "min_bytes", "max_bytes", "workers")


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Section):
    """Show exactly what the model saw at a training step."""

    step: int = 1
    """Training step, as metrics.jsonl counts them: the first is 1."""
    rows: int = 2
    """Rows of the batch to print."""

    def __post_init__(self):
        self.require_numbers(1, 2**31 - 1, "step")
        self.require_positive("rows")

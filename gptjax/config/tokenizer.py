"""Settings of tokenizers."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from gptjax.config.section import Section

LEAST_PIECES = 300  # byte fallback needs all 256 bytes and 3 special tokens in the vocabulary, and then some pieces


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """The tokenizer that turns text into token ids."""

    section: ClassVar[str] = "tokenizer"

    kind: Literal["sentencepiece", "bytes", "huggingface", "tiktoken"] = "sentencepiece"
    """A SentencePiece model; the 256 bytes; a tokenizer.json, or GPT-2's two files; a .tiktoken file."""
    vocab_size: int = 4096
    """Number of token ids, special tokens included; 258 for bytes."""
    path: str = ""
    """The tokenizer's file, or the folder that holds it; empty: train a SentencePiece model on the training split."""
    pattern: Literal["", "gpt2", "cl100k", "o200k"] = ""
    """Published pattern by which a .tiktoken file of one's own splits text into words; empty: a file that is known."""
    template: str = ""
    """The chat template's name, such as chatml or llama3; empty: that of the tokenizer at `path`, if it has one."""

    BYTES_VOCAB: ClassVar[int] = 258  # 256 bytes, beginning and end of document

    def __post_init__(self):
        if self.kind == "bytes":
            fits, then = self.vocab_size == self.BYTES_VOCAB, f"add --tokenizer.vocab-size {self.BYTES_VOCAB}"
            self.require(fits, "vocab_size", f"{self.BYTES_VOCAB} when tokenizer.kind is bytes", then)
            self.require(not self.path, "path", "no path when tokenizer.kind is bytes")
        least = {"bytes": self.BYTES_VOCAB, "sentencepiece": LEAST_PIECES}.get(self.kind, 257)
        self.require(self.vocab_size >= least, "vocab_size", f"at least {least} for {self.kind}")
        self.require(not self.pattern or self.kind == "tiktoken", "pattern", "none unless tokenizer.kind is tiktoken")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """A source of text of which a part is held out, and the folder that is made of it."""

    source: str = "builtin:shakespeare"
    """A text file, .jsonl(.gz, .zst), .parquet, a folder of them, builtin:shakespeare,
    `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`, `hf:NAME[@CONFIG][:SPLIT]`, either with a folder for the name, a function
    MODULE:NAME that yields texts, or token ids of nanoGPT or Megatron (FILE.bin; for `prepare`)."""
    out: str
    """Folder to make."""
    validation_fraction: float = 0.05
    """Share of the bytes that is held out, where the source has no validation split of its own."""
    text_field: str = "text"
    """Name of the text in records of JSONL, Parquet, TFDS and Hugging Face datasets."""
    max_corrupt: int = 0
    """Corrupt files that may be skipped and counted; with one more, or with 0, the verb stops and names it."""

    def __post_init__(self):
        self.require(bool(self.source), "source", "a path or a name", "give --source FILE")
        self.require(bool(self.out), "out", "a folder to make", "give --out FOLDER")
        self.require_numbers(0, math.inf, "max_corrupt")
        self.require(0 < self.validation_fraction < 1, "validation_fraction", "a share above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(SourceConfig):
    """Train a SentencePiece BPE model with byte fallback on the training part of a source."""

    out: str = "tokenizer"
    """Folder to make; its tokenizer.model is what --tokenizer.path takes."""
    vocab_size: int = 4096
    """Number of pieces, special tokens and the 256 bytes included."""

    def __post_init__(self):
        super().__post_init__()
        self.require(self.vocab_size >= LEAST_PIECES, "vocab_size", f"at least {LEAST_PIECES}")

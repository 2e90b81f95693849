"""How text becomes token ids."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptjax.settings import Section


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """How text becomes token ids."""

    section: ClassVar[str] = "tokenizer"

    kind: Literal["sentencepiece", "bytes", "huggingface", "tiktoken"] = "sentencepiece"
    """A SentencePiece model; the 256 bytes; a tokenizer.json, or GPT-2's two files; a .tiktoken file."""
    vocab_size: int = 4096
    """Number of token ids, special tokens included; 258 for bytes."""
    path: str = ""
    """The tokenizer's file, or the folder that holds it; empty: train a SentencePiece model on the training split."""

    BYTES_VOCAB: ClassVar[int] = 258  # 256 bytes, beginning and end of document

    def __post_init__(self):
        if self.kind == "bytes":
            fits, then = self.vocab_size == self.BYTES_VOCAB, f"add --tokenizer.vocab-size {self.BYTES_VOCAB}"
            self.require(fits, "vocab_size", f"{self.BYTES_VOCAB} when tokenizer.kind is bytes", then)
            self.require(not self.path, "path", "no path when tokenizer.kind is bytes")
        # Byte fallback needs all 256 bytes and 3 special tokens in the vocabulary, and then some pieces.
        self.require(self.kind == "bytes" or self.vocab_size >= 300, "vocab_size", "at least 300 for sentencepiece")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(Section):
    """Train a SentencePiece BPE model with byte fallback on the training part of a source."""

    source: str = "builtin:shakespeare"
    """A text file, a folder of texts, a .jsonl(.gz) file, or builtin:shakespeare."""
    out: str = "tokenizer"
    """Folder to make; its tokenizer.model is what --tokenizer.path takes."""
    vocab_size: int = 4096
    """Number of pieces, special tokens and the 256 bytes included."""
    validation_fraction: float = 0.05
    """Share that the tokenizer may not see, as in training."""

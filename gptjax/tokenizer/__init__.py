"""Text to token ids and back, with nothing lost: raw bytes, SentencePiece, byte-level BPE, tiktoken's rank files.

`decode(encode(text)) == text` for every string. Special tokens never come from text: a "<s>" or "<|endoftext|>" in
the text is encoded as ordinary pieces. This is the only package that imports sentencepiece, tokenizers and tiktoken.
"""

from gptjax.tokenizer.bytes import BytesTokenizer
from gptjax.tokenizer.files import (
    check_trainable,
    load_sentencepiece,
    load_tokenizer,
    make_tokenizer,
    open_tokenizer,
    set_template,
)
from gptjax.tokenizer.interface import FILES, META_FILE, MODEL_FILE, Tokenizer, last_safe_cut
from gptjax.tokenizer.sentencepiece import SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "FILES",
    "META_FILE",
    "MODEL_FILE",
    "BytesTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_trainable",
    "last_safe_cut",
    "load_tokenizer",
    "load_sentencepiece",
    "make_tokenizer",
    "open_tokenizer",
    "set_template",
    "train_sentencepiece",
]

"""Byte pair encoders made here, as models elsewhere have them; needs the extra gptjax[bpe]."""

import base64
import json

from awkward_texts import SHAKESPEARE, sentencepiece_model

from gptjax.tokenizer import SentencePieceTokenizer
from gptjax.tokenizer.huggingface import BYTE_CHARACTERS, HuggingFaceTokenizer
from gptjax.tokenizer.splitting import PATTERNS
from gptjax.tokenizer.tiktoken import TiktokenTokenizer

TEXT = SHAKESPEARE[:120_000] + "\u4e2d\u6587\u7684\u4e00\u662f\u3002\n" * 200 + "x\n\n\n  y  12345,\n\n" * 50
END, ROLE, PLAIN = "<|endoftext|>", "<|im_start|>", "[INST]"
SPACES = "        "  # an added token that is text, as GPT-NeoX has them


def byte_level_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE trained on TEXT; the end of a document comes last, as in GPT-2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(made.to_str())["model"]
    return model["vocab"] | {END: len(model["vocab"])}, [tuple(m) for m in model["merges"]]


VOCAB, MERGES = byte_level_files()
TWO_FILES = {
    "vocab.json": json.dumps(VOCAB).encode(),
    "merges.txt": ("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)).encode(),
}
RANKS = {bytes(BYTE_CHARACTERS[c] for c in token): i for token, i in VOCAB.items() if token != END}


def ranks_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def byte_level_json(**changes) -> dict:
    """A tokenizer.json as a chat model has it: added tokens, a template that adds some, Llama 3's way of splitting."""
    added = [(END, VOCAB[END], True), (ROLE, len(VOCAB), False), (PLAIN, len(VOCAB) + 1, False)]
    added += [(SPACES, len(VOCAB) + 2, False)]
    split = {"type": "Split", "pattern": {"Regex": PATTERNS["cl100k"]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = {"SpecialToken": {"id": END, "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, "special": special, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for text, i, special in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [], "special_tokens": {END: {"id": END, "ids": [VOCAB[END]], "tokens": [END]}}},
        "decoder": level,
        "model": {"type": "BPE", "vocab": VOCAB, "merges": MERGES, "ignore_merges": True},
    } | changes  # fmt: skip


def llama_json(model: bytes, legacy: bool, **changes) -> dict:
    """A SentencePiece BPE model as a tokenizer.json: its pieces, and as merges every way to make each of them."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    merges = []
    for piece in sorted(vocab, key=lambda p: -processor.get_score(vocab[p])):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    special = [p for p in vocab if processor.is_control(vocab[p]) or p in ("<unk>", ROLE, PLAIN)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    return {
        "added_tokens": [{"id": vocab[p], "content": p, "special": p.startswith("<")} for p in special],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True,
                  "unk_token": "<unk>"},
    } | changes  # fmt: skip


def from_json(values: dict, **ends) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer({"tokenizer.json": json.dumps(values).encode()}, **ends)


def llama_model(**changes) -> bytes:
    settings = {"vocab_size": 700, "user_defined_symbols": [ROLE, PLAIN]} | changes
    return sentencepiece_model(TEXT[:60_000], **settings)


LLAMA = llama_model()
TOKENIZERS = {
    "two files": HuggingFaceTokenizer(TWO_FILES),
    "tokenizer.json": from_json(byte_level_json()),
    "llama, legacy": from_json(llama_json(LLAMA, legacy=True)),
    "llama, metaspace": from_json(llama_json(LLAMA, legacy=False)),
    "tiktoken": TiktokenTokenizer(ranks_file(RANKS), "gpt2"),
    "tiktoken cl100k": TiktokenTokenizer(ranks_file(RANKS), "cl100k"),
    "tiktoken o200k": TiktokenTokenizer(ranks_file(RANKS), "o200k"),
    "sentencepiece": SentencePieceTokenizer(LLAMA),
    "unigram": SentencePieceTokenizer(llama_model(model_type="unigram")),
}

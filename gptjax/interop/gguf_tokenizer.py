"""Tokenizers from the keys of a GGUF file: byte-level byte pairs, and SentencePiece's with their scores.

Where a key is missing, llama.cpp's default for that kind of tokenizer holds.
"""

import json
from collections.abc import Mapping
from typing import Any

from gptjax.config.section import InputError
from gptjax.tokenizer import SentencePieceTokenizer, Tokenizer
from gptjax.tokenizer.conventions import set_known_template
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer
from gptjax.tokenizer.interface import JSON_FILE
from gptjax.tokenizer.sentencepiece import sentencepiece_model
from gptjax.tokenizer.splitting import COMPLETE, PATTERNS

KEY = "tokenizer.ggml."
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_QWEN2 = [next(p for p in COMPLETE if p not in PATTERNS.values()), _BYTES | {"use_regex": False}]
_LLAMA3 = [PATTERNS["cl100k"], _BYTES | {"use_regex": False}]
# tokenizer.ggml.pre: the way in which a byte-level tokenizer cuts text into words.
SPLITS = {
    "gpt-2": [_BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
# They look up whole words first, and begin a prompt with bos.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type, which has SentencePiece's numbers
# Of a vocabulary without merges, one that never applies: llama.cpp asks for a list that is not empty.
NO_MERGES = ["\u0100\u0100 \u0100\u0100"]
# Control tokens that end a text in every model that has them, named by a key or not.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")


def read_tokenizer(keys: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer of a file's keys; raises InputError where it is none that is known, or would lose text."""
    kind = keys.get(f"{KEY}model")
    if kind not in ("llama", "gpt2"):
        raise InputError(f"tokenizer {kind} is not known; wanted gpt2 or llama")
    tokens, types = _list(keys, "tokens", str), _list(keys, "token_type", int)
    if len(types) != len(tokens):
        raise InputError(f"{len(tokens)} tokens of {len(types)} types; wanted a type for each")
    if kind == "llama":
        made, begins = _sentencepiece(keys, tokens, types, name), True
    else:
        made, begins = _byte_level(keys, tokens, types, name), keys.get(f"{KEY}pre") in WHOLE_WORDS
    made.begins = bool(keys.get(f"{KEY}add_bos_token", begins))
    control = {tokens[i]: i for i, type_ in enumerate(types) if type_ == CONTROL}
    ends = [_id(keys, end, len(tokens)) for end in ("eot", "eom")] + [control.get(end) for end in ENDS]
    made.stop_ids = tuple(dict.fromkeys(i for i in ends if i is not None and i != made.eos_id))
    set_known_template(made, keys.get("tokenizer.chat_template"))
    return made


def _sentencepiece(keys: Mapping[str, Any], tokens: list[str], types: list[int], name: str) -> Tokenizer:
    scores = _list(keys, "scores", float)
    if len(scores) != len(tokens):
        raise InputError(f"{len(tokens)} tokens of {len(scores)} scores; wanted a score for each")
    bos, eos = (_id(keys, end, len(tokens), default) for end, default in (("bos", 1), ("eos", 2)))
    space = bool(keys.get(f"{KEY}add_space_prefix", True))
    try:
        model = sentencepiece_model(tokens, scores, types, bos or 0, eos or 0, adds_space=space)
    except ValueError as error:  # a type that SentencePiece has not
        raise InputError(f"the tokens of {name} are no SentencePiece model ({error})") from None
    return SentencePieceTokenizer(model, f"the tokenizer of {name}")


def _byte_level(keys: Mapping[str, Any], tokens: list[str], types: list[int], name: str) -> Tokenizer:
    pre = keys.get(f"{KEY}pre", "gpt-2")
    if pre not in SPLITS:
        raise InputError(f"tokenizer gpt2 splits text as {pre!r}, which is not known; wanted {' or '.join(SPLITS)}")
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [split | {"pattern": {"Regex": s}} if isinstance(s, str) else s for s in SPLITS[pre]]
    merges = _list(keys, "merges", str)
    content = {
        "added_tokens": [
            {"content": token, "id": i, "special": types[i] == CONTROL}
            for i, token in enumerate(tokens)
            if types[i] in (CONTROL, USER_DEFINED)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [] if merges == NO_MERGES else merges,
            "ignore_merges": pre in WHOLE_WORDS,
        },
    }
    ids = {end: _id(keys, end, len(tokens)) for end in ("bos", "eos")}
    ends = {end: "" if i is None else tokens[i] for end, i in ids.items()}
    return HuggingFaceTokenizer({JSON_FILE: json.dumps(content).encode()}, **ends, name=name)


def _id(keys: Mapping[str, Any], end: str, size: int, default: int | None = None) -> int | None:
    i = keys.get(f"{KEY}{end}_token_id", default)
    if i is not None and (type(i) is not int or not 0 <= i < size):
        raise InputError(f"{end}_token_id={i}; wanted one of {size} tokens")
    return i


def _list(keys: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = keys.get(KEY + key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise InputError(f"{KEY}{key} is missing or no list of {kind.__name__}; wanted the tokenizer's")
    return values

"""Tokenizers in the form that transformers reads: tokenizer.json and tokenizer_config.json, with equal ids."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from gptjax.config.section import InputError, one_line
from gptjax.tokenizer.bytes import BytesTokenizer
from gptjax.tokenizer.huggingface import BYTE_CHARACTERS, PROBES, HuggingFaceTokenizer
from gptjax.tokenizer.interface import JSON_FILE, MODEL_FILE, SPACE_SYMBOL, Tokenizer
from gptjax.tokenizer.jinja import jinja_for
from gptjax.tokenizer.known_templates import template_of
from gptjax.tokenizer.sentencepiece import SentencePieceTokenizer
from gptjax.tokenizer.splitting import PATTERNS
from gptjax.tokenizer.tiktoken import TiktokenTokenizer

T = TypeVar("T", str, bytes)

CONFIG_FILE = "tokenizer_config.json"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# Beside PROBES: words, capitals and runs, in which ways to merge differ where they differ at all.
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and so on.\n\nSecond paragraph; it's 12:30 already!",
    "def f(x):\n    return {'a': [x ** 2, -1.5e-3]}  # \t tab\n\n\n",
    "aaaaaaaaaaaaaaaaaaaaaaab bbbbbbbbbbbb  ---- ==== ....",
    "HELLO World hElLo \u00fcber na\u00efve \u0130stanbul \u00df",
    "\u043f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u4f60\u597d\uff0c\u4e16\u754c\u3002"
    "\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f1e9\U0001f1ea",
    " leading", "trailing ", "\n\n a\n  b\n   c", "<0x41><unk>", "< 0x41 >", "https://example.org/?q=1&r=%20#x",
)  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, folder: Path, more: Mapping[str, int] = MappingProxyType({})) -> None:
    """Writes tokenizer.json and tokenizer_config.json: the names of bos and eos, if bos is added, the chat template.

    A SentencePiece tokenizer's .model file is written beside them. `more` are special tokens beside the tokenizer's.

    Before anything is written, the ids of awkward texts through the tokenizers library are held against the
    tokenizer's. They are equal but for text that is the name of a special token, which becomes that token there, for
    U+2581, which SentencePiece's files can't tell from a space, and for a space at the beginning where the tokenizer
    that was imported loses it (Metaspace). Raises InputError naming a text whose ids differ, and where the library is
    missing.
    """
    try:
        import tokenizers
    except ImportError:
        raise InputError("writing tokenizer.json needs the library tokenizers; pip install 'gptjax[bpe]'") from None
    values = {"version": "1.0", "truncation": None, "padding": None} | _content(tokenizer, more)
    text = json.dumps(values, ensure_ascii=False)
    try:
        made = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise InputError(f"this {tokenizer.kind} tokenizer can't be a {JSON_FILE}: {one_line(error)}") from None
    _check(tokenizer, made, loses_space="Metaspace" in json.dumps(values["pre_tokenizer"]))
    names = {i: name for name, i in tokenizer.specials.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "add_bos_token": tokenizer.begins,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.template:
        config["chat_template"] = jinja_for(tokenizer, template_of(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_FILE).write_text(text, encoding="utf-8")
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / MODEL_FILE).write_bytes(tokenizer.model)


def _content(tokenizer: Tokenizer, more_tokens: Mapping[str, int]) -> dict[str, Any]:
    if isinstance(tokenizer, BytesTokenizer):
        values = _byte_level(BYTE_CHARACTERS, [])
    elif isinstance(tokenizer, TiktokenTokenizer):
        values = _of_ranks(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        values = _of_sentencepiece(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        values = tokenizer.as_json()
    else:
        raise InputError(f"a tokenizer of kind {tokenizer.kind} can't be written as {JSON_FILE}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {token["content"]: flags | token for token in values.get("added_tokens", ())}
    for name, i in {**tokenizer.specials, **more_tokens}.items():
        added[name] = flags | {"id": i} | added.get(name, {}) | {"content": name, "special": True}
    values["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    if isinstance(values["model"]["vocab"], dict):  # a token that is not in it would get the next free id
        more = {token["content"]: token["id"] for token in values["added_tokens"]}
        values["model"] = values["model"] | {"vocab": values["model"]["vocab"] | more}
    bos = next(name for name, i in tokenizer.specials.items() if i == tokenizer.bos_id)
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if tokenizer.begins else []
    special = {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}} if tokenizer.begins else {}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*first, text[0]],
        "pair": [*first, *text],
        "special_tokens": special,
    }
    if not values.get("decoder"):
        marked = SPACE_SYMBOL in json.dumps([values.get("normalizer"), values.get("pre_tokenizer")], ensure_ascii=False)
        values["decoder"] = _spaces_decoder(tokenizer) if marked else _BYTE_LEVEL
    return values


def _spaces_decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.adds_space else []
    steps = [{"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}, {"type": "ByteFallback"},
             {"type": "Fuse"}, *strip]  # fmt: skip
    return {"type": "Sequence", "decoders": steps}


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str = "") -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [split, _BYTE_LEVEL] if pattern else [_BYTE_LEVEL]
    return {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True},
    }


def _merges(tokens: Iterable[T], ids: Mapping[T, int]) -> Iterator[tuple[T, T]]:
    """Yields every way to make each token, in their order, of two that have ids; the ways of one by these ids."""
    for token in tokens:
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        yield from sorted(((a, b) for a, b in pairs if a in ids and b in ids), key=lambda p: (ids[p[0]], ids[p[1]]))


def _of_ranks(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """Every way to make a token of two, by the rank of the token: tiktoken merges the pair of the lowest rank."""
    characters = {byte: c for c, byte in BYTE_CHARACTERS.items()}
    ranks = tokenizer.ranks()
    spelt = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [(spelt[a], spelt[b]) for a, b in _merges(ranks, ranks)]
    return _byte_level({spelt[token]: i for token, i in ranks.items()}, merges, PATTERNS[tokenizer.pattern])


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The pieces of a .model file, as byte pairs with every way to make each by its score, or as a unigram model."""
    proto = tokenizer.proto()
    kinds, pieces = proto.SentencePiece, list(proto.pieces)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}
    prepend = [{"type": "Prepend", "prepend": SPACE_SYMBOL}] if tokenizer.adds_space else []
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == kinds.UNKNOWN), None)
    values: dict[str, Any] = {
        "added_tokens": [
            {"content": p.piece, "id": i, "special": False, "normalized": True}
            for i, p in enumerate(pieces)
            if p.type == kinds.USER_DEFINED
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
    }
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        # The library finds the names of bytes, and of unknown text, in text too: it is cut behind their first letter.
        names = [p.piece for p in pieces if p.type in (kinds.UNKNOWN, kinds.UNUSED) and len(p.piece) > 1]
        named = ["<(?=0x[0-9A-F]{2}>)", *(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)]
        cut = {
            "type": "Split",
            "pattern": {"Regex": "|".join(named)},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
        lowest = min(p.score for p in pieces if p.type == kinds.NORMAL)
        vocab = [[p.piece, p.score if p.type == kinds.NORMAL else lowest] for p in pieces]
        model = {"type": "Unigram", "vocab": vocab, "unk_id": unknown, "byte_fallback": True}
        return values | {"pre_tokenizer": cut, "model": model}
    normal = {p.piece: i for i, p in enumerate(pieces) if p.type == kinds.NORMAL}
    merges = list(_merges(sorted(normal, key=lambda p: -pieces[normal[p]].score), normal))
    return values | {
        "model": {
            "type": "BPE",
            "vocab": {p.piece: i for i, p in enumerate(pieces)},
            "merges": merges,
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": pieces[unknown].piece if unknown is not None else None,
        }
    }


def _check(tokenizer: Tokenizer, made: Any, loses_space: bool) -> None:
    """Raises InputError for a text, or a special token, that gives other ids through the library."""
    for text in _texts(tokenizer):
        text = text.lstrip(" ") if loses_space else text
        got, want = made.encode(text, add_special_tokens=False).ids, tokenizer.encode(text)
        if got != want:
            raise InputError(
                f"{JSON_FILE} would give {text[:40]!r} other ids than this {tokenizer.kind} tokenizer "
                f"({got[:6]}, wanted {want[:6]}); give transformers the run's own tokenizer files"
            )
    for name, i in tokenizer.specials.items():
        if made.encode(name, add_special_tokens=False).ids != [i]:
            raise InputError(f"{JSON_FILE} would not give the special token {name!r} its id {i}; it can't be written")


def _texts(tokenizer: Tokenizer) -> Iterable[str]:
    """Awkward texts that both are given, without names of special tokens and characters that have no ids."""
    for text in (*PROBES, *_TEXTS):
        text = "".join(c for c in text if c != SPACE_SYMBOL and not {*c.encode()} & {*tokenizer.missing})
        if not any(name in text for name in tokenizer.specials):
            yield text

"""Byte pair encoders from a tokenizer.json, or from GPT-2's two files, through the tokenizers library."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError, one_line
from gptjax.tokenizer.interface import (
    JSON_FILE,
    MERGES_FILE,
    NOWHERE,
    SPACE_SYMBOL,
    VOCAB_FILE,
    Tokenizer,
    is_text,
    utf8,
)
from gptjax.tokenizer.sentencepiece import cuts_between_pieces
from gptjax.tokenizer.splitting import COMPLETE, WORD_ENDS

PAIRS = ((VOCAB_FILE, MERGES_FILE), ("encoder.json", "vocab.bpe"))  # the same two files under two names
BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
ENDINGS = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")

_LARGEST = 1 << 23  # ids beyond any vocabulary in use; a table of them is held in memory

# Texts that a tokenizer which loses something is likely to lose something of.
PROBES = (
    "", " ", "  ", "\n", "\r\n", "\t\n \n", " a", "a ", "a  b", "A\u00c4a\u0308\u212b", "\u4e2d\u6587\uff0c\u3002",
    "\ufb01 \u2460 \uff21", "\U0001f469\u200d\U0001f680", "\ufeffx\u200b", "\u2581", " \u2581x ", "\ufffd", "<0x41>",
    "don't DON'T", "1234567", "...\n\n\n  x", "\0\x01\x1f\x7f\x85\xa0", "\u2028\u3000\u0301", "\U0010ffff",
    "".join(map(chr, range(0x180))),
)  # fmt: skip


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's files: itself, or one from U+0100 on where it has no ink."""
    inked = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    blank = [byte for byte in range(256) if byte not in inked]
    return {chr(byte): byte for byte in inked} | {chr(256 + i): byte for i, byte in enumerate(blank)}


BYTE_CHARACTERS = _byte_characters()
# Bytes that a vocabulary trained on text may lack: control characters, and those that begin rare characters or none.
RARE_BYTES = {*range(0x20), 0x7F, *range(0xC0, 0x100)} - {*b"\t\n\r"}


class HuggingFaceTokenizer(Tokenizer):
    """A byte pair encoder given as the content of tokenizer.json, or of vocab.json and merges.txt, by file name.

    `bos` and `eos` name the tokens that begin and end a document; where empty, well-known names are tried, and one
    token serves as both where there is no other. Added tokens other than white space and single characters are
    special. Ids are those of the library with these taken out, but for what it would lose: a document's leading space
    and U+2581 are kept, as SentencePiece keeps them. Raises InputError where text would be lost; where single bytes
    have no token, which is so for some control characters in some vocabularies, a text that has one is refused. Where
    the file composes characters (NFC, as Qwen's does), text is taken as it is: composed text has the same ids.
    """

    kind = "huggingface"

    def __init__(self, content: dict[str, bytes], bos: str = "", eos: str = "", name: str = JSON_FILE):
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{name} needs the library tokenizers; pip install 'gptjax[bpe]'") from None

        spec = _Spec(_read(content, name), name)
        bos, eos = spec.ends(bos, eos)
        for end in (bos, eos):
            spec.specials[end] = spec.ids[end]
            spec.atoms.pop(end, None)
        self.specials = spec.specials
        self.bos_id, self.eos_id = spec.ids[bos], spec.ids[eos]
        self.vocab_size = max(spec.ids.values()) + 1
        self._bytes = spec.table(self.vocab_size)
        self.missing = spec.missing
        self._atoms = spec.atoms
        self.adds_space, self.adds_space_once = spec.adds_space, spec.adds_space_once
        self.strips = {i: sides for i, sides in spec.strips.items() if sides and i in self.specials.values()}
        self.safe_cut = spec.safe_cut(self._bytes)
        self._content = content
        self._ends = {"bos": bos, "eos": eos}
        files = {file: hashlib.sha256(data).hexdigest() for file, data in content.items()}
        self.sha256 = hashlib.sha256(json.dumps([files, self._ends], sort_keys=True).encode()).hexdigest()
        try:
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(spec.without_specials()))
        except Exception as error:  # the library raises no narrower type
            raise InputError(f"{name} can't be used by the library tokenizers: {one_line(error)}") from None
        never = set(self.specials.values())
        probes = ["".join(c for c in text if not {*c.encode()} & {*self.missing}) for text in (*PROBES, *self.specials)]
        for text, ids in zip(probes, self.encode_batch(probes)):
            if self.decode(ids) != text or not never.isdisjoint(ids):
                raise spec.error(f"gives {text[:40]!r} back as {self.decode(ids)[:40]!r}")

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] = ()) -> list[list[int]]:
        for text in texts if self.missing else ():
            data = utf8(text)
            if len(data.translate(None, self.missing)) < len(data):
                lost = next(c for c in text if {*c.encode()} & {*self.missing})
                raise InputError(f"text has U+{ord(lost):04X}, of which this tokenizer has no token; leave it out")
        return super().encode_batch(texts, starts)

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        return [row.ids for row in self._encoder.encode_batch_fast(parts, add_special_tokens=False)]

    def _described(self) -> dict[str, str]:
        return self._ends

    def as_json(self) -> dict[str, Any]:
        """The content of a tokenizer.json: that which was given, or what the two files say in its form."""
        return _read(self._content, next(iter(self._content)))


def read_huggingface(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json, of GPT-2's two files (give either) or of the folder that holds them.

    The names of the tokens that begin and end a document are read from tokenizer_config.json beside it, where it is.
    """
    folder = path if path.is_dir() else path.parent
    paired = path.is_dir() or any(path.name in pair for pair in PAIRS)
    if path.is_dir() and (path / JSON_FILE).is_file() or not paired:
        file = path / JSON_FILE if path.is_dir() else path
        content, name = {JSON_FILE: file.read_bytes()}, str(file)
    else:
        pair = next((pair for pair in PAIRS if all((folder / part).is_file() for part in pair)), None)
        if pair is None:
            raise InputError(f"{path} has no {JSON_FILE}, nor {' and '.join(PAIRS[0])}, nor {' and '.join(PAIRS[1])}")
        if (folder / "added_tokens.json").is_file():
            raise InputError(f"{folder}/added_tokens.json adds tokens to {pair[0]}; wanted all in a {JSON_FILE}")
        content = dict(zip(PAIRS[0], ((folder / part).read_bytes() for part in pair)))
        name = str(folder / pair[0])
    named: dict[str, str] = {}
    for beside in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / beside).is_file():
            values = _parse((folder / beside).read_bytes(), str(folder / beside))
            for end in ("bos", "eos"):
                token = values.get(f"{end}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str) and token:
                    named[end] = token
    return HuggingFaceTokenizer(content, **named, name=name)


class _Spec:
    """The content of a tokenizer.json, checked to be of a kind that loses nothing."""

    def __init__(self, values: dict[str, Any], name: str):
        self.name, self.model = name, values["model"]
        self.normalizer = _steps(values.get("normalizer"), "normalizers", name)
        self.splits = _steps(values.get("pre_tokenizer"), "pretokenizers", name)
        self.byte_level = any(step.get("type") == "ByteLevel" for step in self.splits)
        self.adds_space = self.adds_space_once = False
        self.strips: dict[int, str] = {}
        self._check_normalizer()
        self._check_splits()
        self._check_model()
        self.ids: dict[str, int] = dict(self.model["vocab"])
        self.merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in self.model["merges"]]
        self.specials: dict[str, int] = {}
        self.atoms: dict[str, list[int]] = {}
        for token in values.get("added_tokens") or ():
            self._add(token)
        if len(set(self.ids.values())) < len(self.ids):
            raise InputError(f"{name} gives two tokens the same id; the file is damaged")
        if not self.byte_level:
            self.atoms[SPACE_SYMBOL] = [self.ids[f"<0x{byte:02X}>"] for byte in SPACE_SYMBOL.encode()]

    def error(self, loss: str, advice: str = "use one that loses nothing") -> InputError:
        return InputError(f"{self.name} {loss}, so text would not come back as it was; {advice}")

    def _check_normalizer(self) -> None:
        for step in self.normalizer:
            if step.get("type") == "Prepend" and step.get("prepend") == SPACE_SYMBOL:
                self.adds_space = True
            elif step.get("pattern") != {"String": " "} or step.get("content") != SPACE_SYMBOL:
                raise self.error(f"changes characters (normalizer {step.get('type')})")
        if self.byte_level and self.normalizer:
            raise self.error("marks spaces and is byte-level too")
        self.normalizer = [step for step in self.normalizer if step["type"] != "Prepend"]

    def _check_splits(self) -> None:
        marks = bool(self.normalizer)
        for step in self.splits:
            kind = step.get("type")
            if kind == "ByteLevel" and step.get("add_prefix_space"):
                raise self.error("adds a space to some texts only (ByteLevel with add_prefix_space)")
            if kind == "Metaspace" and step.get("replacement") == SPACE_SYMBOL:
                marks = True
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                self.adds_space |= scheme != "never"
                self.adds_space_once = scheme == "first"
            elif kind in ("Split", "Punctuation") and step.get("behavior") == "Removed":
                if not (step.get("invert") and _regex(step) in COMPLETE):
                    raise self.error(f"leaves out what it splits at (pre_tokenizer {kind})")
            elif kind not in ("ByteLevel", "Split", "Punctuation", "Digits", "UnicodeScripts"):
                raise self.error(f"leaves out or changes spaces (pre_tokenizer {kind})")
        if not self.byte_level and not marks:
            raise self.error("is neither byte-level nor marks spaces with U+2581")

    def _check_model(self) -> None:
        kind, vocab = self.model.get("type", "BPE"), self.model.get("vocab")
        if kind != "BPE":
            advice = "give the SentencePiece .model file, if there is one" if kind == "Unigram" else "wanted BPE"
            raise self.error(f"is a {kind} model, which has no tokens for what it does not know", advice)
        if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < _LARGEST for i in vocab.values()):
            raise InputError(f"{self.name}: wanted a vocabulary of tokens and their ids in model.vocab")
        merges = self.model.get("merges")
        if not isinstance(merges, list) or not all(isinstance(part, str) for merge in merges for part in merge):
            raise InputError(f"{self.name}: wanted pairs of tokens in model.merges")
        if self.model.get("dropout"):
            raise InputError(f"{self.name} leaves out merges at random (model.dropout); set it to null in a copy of it")
        for marker in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(marker):
                raise self.error(f"marks parts of words with {self.model[marker]!r} (model.{marker})")
        if not self.byte_level and (self.model.get("ignore_merges") or not self.model.get("byte_fallback")):
            raise self.error("has no byte fallback (model.byte_fallback), or ignores merges (model.ignore_merges)")
        wanted = BYTE_CHARACTERS if self.byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        missing = [piece for piece in wanted if piece not in vocab]
        self.missing = bytes(BYTE_CHARACTERS[piece] for piece in missing if self.byte_level)
        if missing and not (self.byte_level and {*self.missing} <= RARE_BYTES):
            raise self.error(f"has no token {missing[0]!r}, which stands for a byte")

    def _add(self, token: dict[str, Any]) -> None:
        """Notes an added token as special, as text that is looked for first, or as a piece like others."""
        content, i = token.get("content"), token.get("id")
        if not isinstance(content, str) or not content or type(i) is not int or not 0 <= i < _LARGEST:
            raise InputError(f"{self.name}: wanted added_tokens with a content and an id, got {str(token)[:80]}")
        self.ids[content] = i
        self.strips[i] = "".join(flag[0] for flag in ("lstrip", "rstrip") if token.get(flag))
        if token.get("special") or not is_text(content if self.byte_level else content.replace(SPACE_SYMBOL, " ")):
            self.specials[content] = i
        elif any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise self.error(f"takes text away around the added token {content!r}")
        elif self.byte_level or SPACE_SYMBOL not in content:
            self.atoms[content] = [i]

    def ends(self, bos: str, eos: str) -> tuple[str, str]:
        """The tokens that begin and end a document: those named, or else well-known ones among the special tokens."""
        for named, end in ((bos, "bos_token"), (eos, "eos_token")):
            if named and named not in self.ids:
                raise InputError(f"{self.name} has no token {named!r}, which tokenizer_config.json calls {end}")
        bos = bos or next((token for token in BEGINNINGS if token in self.specials), "")
        eos = eos or next((token for token in ENDINGS if token in self.specials), "")
        if not bos and not eos:
            raise InputError(f"{self.name} has no token that begins or ends a document; name one as eos_token in "
                             "a tokenizer_config.json beside it")  # fmt: skip
        return bos or eos, eos or bos

    def table(self, vocab_size: int) -> list[bytes]:
        """The bytes that each id stands for; none for special tokens."""
        table = [b""] * vocab_size
        for piece, i in self.ids.items():
            if piece in self.specials:
                continue
            if not self.byte_level and re.fullmatch("<0x[0-9A-F]{2}>", piece):
                table[i] = bytes([int(piece[3:5], 16)])
            elif self.byte_level and piece not in self.atoms and all(c in BYTE_CHARACTERS for c in piece):
                table[i] = bytes(BYTE_CHARACTERS[c] for c in piece)
            else:
                table[i] = (piece if self.byte_level else piece.replace(SPACE_SYMBOL, " ")).encode()
        return table

    def safe_cut(self, table: list[bytes]) -> re.Pattern[str]:
        """The cuts of a text that change no ids; none, for a way of splitting that is not known."""
        steps = [step for step in self.splits if step["type"] not in ("Digits", "Punctuation")]
        if not self.byte_level:
            return cuts_between_pieces(table) if all(step["type"] == "Metaspace" for step in steps) else NOWHERE
        match [step["type"] for step in steps]:
            case ["ByteLevel"]:
                known = steps[0].get("use_regex", True)
            case ["Split", "ByteLevel"]:
                known = _regex(steps[0]) in COMPLETE and not steps[1].get("use_regex", True)
            case _:
                known = False
        return WORD_ENDS if known else NOWHERE

    def without_specials(self) -> dict[str, Any]:
        """The same tokenizer without special tokens: neither looked for in text, nor made by merges, nor added.

        (`encode_special_tokens` of the library still lets merges, and words that are looked up whole, make them.)
        """
        gone = set(self.specials)
        # Merges that spell a byte's name would make text of the form <0x41> that byte.
        named = set() if self.byte_level else {f"<0x{byte:02X}>" for byte in range(256)}
        model = self.model | {
            "unk_token": None,
            "vocab": {piece: i for piece, i in self.model["vocab"].items() if piece not in gone},
            "merges": [m for m in self.merges if not gone & {*m, "".join(m)} and "".join(m) not in named],
        }
        splits = [
            {k: v for k, v in step.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
            if step["type"] == "Metaspace"
            else step
            for step in self.splits
        ]
        return {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": self.normalizer} if self.normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
            "post_processor": None,
            "decoder": None,
            "model": model,
        }


def _read(content: dict[str, bytes], name: str) -> dict[str, Any]:
    """The tokenizer.json as it is, or the two files in its form; a token that no merge makes is then special."""
    if JSON_FILE in content:
        values = _parse(content[JSON_FILE], name)
        if not isinstance(values.get("model"), dict):
            raise InputError(f'{name} is no tokenizer.json: wanted a JSON object with a "model"')
        steps = _steps(values.get("normalizer"), "normalizers", name)
        kept = [step for step in steps if step["type"] != "NFC"]
        return values if kept == steps else values | {"normalizer": {"type": "Sequence", "normalizers": kept}}
    vocab = _parse(content[VOCAB_FILE], name)
    merges = []
    ordinary = set(BYTE_CHARACTERS)
    for number, line in enumerate(_text(content[MERGES_FILE], name).split("\n"), 1):
        line = line.rstrip("\r")
        if line and not (number == 1 and line.startswith("#version")):
            pair = line.split(" ")
            if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
                raise InputError(f"the merges of {name}: line {number} is {line[:40]!r}; wanted two tokens of {name}")
            merges.append(pair)
            ordinary.add("".join(pair))
    return {
        "added_tokens": [{"content": t, "id": i, "special": True} for t, i in vocab.items() if t not in ordinary],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _parse(data: bytes, name: str) -> dict[str, Any]:
    text = _text(data, name)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{name}: wanted a JSON object, got a {type(values).__name__}")
    return values


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8") from None


def _steps(part: Any, inner: str, name: str) -> list[dict[str, Any]]:
    """A normalizer or pre_tokenizer as the list of its steps; sequences may hold sequences."""
    if part is None:
        return []
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InputError(f"{name}: wanted steps of {inner} with a type, got {str(part)[:80]}")
    return (
        [step for p in part.get(inner, ()) for step in _steps(p, inner, name)] if part["type"] == "Sequence" else [part]
    )


def _regex(step: dict[str, Any]) -> str:
    pattern = step.get("pattern")
    return pattern.get("Regex", "") if isinstance(pattern, dict) else ""

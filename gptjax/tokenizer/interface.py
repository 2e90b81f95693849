"""The base of every tokenizer: ids that stand for pieces of text."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gptjax.config.section import InputError

META_FILE = "tokenizer_meta.json"
MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
RANKS_FILE = "tokenizer.tiktoken"
FILES = (META_FILE, MODEL_FILE, JSON_FILE, VOCAB_FILE, MERGES_FILE, RANKS_FILE)  # every name that a `save` may write
SCHEMA = 1

# SentencePiece writes a space as this character, so the character itself can only be spelled by its bytes.
SPACE_SYMBOL = "\u2581"

ANYWHERE, NOWHERE = re.compile(""), re.compile("(?!)")  # for `safe_cut`

_WINDOW = 1 << 10  # characters first searched for the last safe cut


class Tokenizer:
    """Ids below vocab_size, of which bos_id, eos_id and specials never come from text.

    `specials` are the control tokens by name, for prompts that are built from ids. `safe_cut` matches, without width,
    where a text may be cut: encoding both parts (the second one with starts False) gives the ids of the whole. It may
    match nowhere.

    A subclass encodes text without special tokens. `_bytes` are the bytes of each id, empty for special ones; `_atoms`
    are strings that a model can't be given and the ids they stand for.
    """

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int
    eos_id: int
    sha256: str
    specials: Mapping[str, int]
    safe_cut: re.Pattern[str]
    _bytes: list[bytes]
    _content: dict[str, bytes]  # of the files that `save` writes, by name
    begins: bool = True
    """A prompt begins with bos_id; False for imported models that were trained without."""
    stop_ids: tuple[int, ...] = ()
    """Ids beside eos_id that end a text, of imported models."""
    template: str = ""
    """The name of the chat template, one of known_templates.TEMPLATES; empty where there is none."""
    adds_space: bool = False
    """Documents get a space in front that is no part of their text."""
    adds_space_once: bool = False
    """Of the texts between special tokens only one at the very beginning gets the space in front."""
    strips: Mapping[int, str] = {}
    """Special tokens that take the white space on their left (l), on their right (r) or on both sides with them."""
    missing: bytes = b""
    """Bytes that have no token: a text with one of them is refused."""
    _atoms: Mapping[str, list[int]] = {}

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def _described(self) -> dict[str, Any]:
        """Settings that `load_tokenizer` needs beside the files, as JSON."""
        return {}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: eos_id and stop_ids."""
        return (self.eos_id, *self.stop_ids)

    @property
    def opens_with_space(self) -> bool:
        """True where the ids of a document begin with a space that is no part of its text, as Llama's do."""
        return self.decode_bytes(self.encode("x")).startswith(b" ")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that `save` writes."""
        return (META_FILE, *self._content)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens; raises InputError where it holds half a surrogate pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] = ()) -> list[list[int]]:
        """Encodes each text for itself, on all cores; starts[i] is False where texts[i] goes on with a document."""
        for text in texts:
            utf8(text)
        if self.adds_space:
            begins = starts or [True] * len(texts)
            texts = [" " + text if text and first else text for text, first in zip(texts, begins, strict=True)]
        if not self._atoms:
            return self._encode_parts(list(texts))
        longest_first = sorted(self._atoms, key=len, reverse=True)
        split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        texts_split = [split(text) for text in texts]  # every second part is an atom
        encoded = iter(self._encode_parts([part for parts in texts_split for part in parts[::2]]))
        result = []
        for parts in texts_split:
            ids = list(next(encoded))
            for atom in parts[1::2]:
                ids += self._atoms[atom]
                ids += next(encoded)
            result.append(ids)
        return result

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that a model continues: bos_id where prompts begin with it, or there is no text, and the text's."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.begins or not ids else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special ids render as nothing, bytes that are not UTF-8 as U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self.adds_space and text.startswith(" ") else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text; decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b)."""
        return b"".join([self._bytes[i] for i in checked_ids(ids, self.vocab_size)])

    def save(self, folder: Path) -> None:
        """Writes the files that the tokenizer was read from, and a description that they are checked against."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._content.items():
            (folder / name).write_bytes(content)
        meta = {"schema": SCHEMA, "kind": self.kind, "vocab_size": self.vocab_size, "sha256": self.sha256}
        meta |= {"begins": self.begins, "stop_ids": list(self.stop_ids), "template": self.template}
        text = json.dumps(meta | self._described(), indent=1) + "\n"
        (folder / META_FILE).write_text(text, encoding="utf-8")


def last_safe_cut(tokenizer: Tokenizer, text: str) -> int:
    """The last offset inside the text at which `tokenizer.safe_cut` lets it be cut; 0 where there is none."""
    window = _WINDOW
    while True:
        low = max(1, len(text) - window)
        cuts = [m.start() for m in tokenizer.safe_cut.finditer(text, low) if m.start() < len(text)]
        if cuts or low == 1:
            return cuts[-1] if cuts else 0
        window *= 8


def is_text(piece: str) -> bool:
    """True for an added or user-defined token that is text, no control token: white space, or one printable character.

    Runs of spaces and single digits are added to some vocabularies, and their models expect them. Anything longer
    ("<|im_start|>", "[INST]") may stand for a role and so never comes from text.
    """
    return piece.isspace() or (len(piece) == 1 and piece.isprintable())


def utf8(text: str) -> bytes:
    """The text as UTF-8; raises InputError where it holds half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has half a surrogate pair, U+{ord(text[error.start]):04X}, at character {error.start}; "
            "wanted text that UTF-8 can write"
        ) from None


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as a list; a negative one would pick a token from the end of the table."""
    ids = [int(i) for i in ids]
    if ids and not (0 <= min(ids) and max(ids) < vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise InputError(f"token id {bad} is outside the tokenizer's vocabulary; wanted 0 to {vocab_size - 1}")
    return ids

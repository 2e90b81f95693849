"""Byte pair encoders from tiktoken's files of ranks: base64 of a token, a space and its id on each line."""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from gptjax.config.section import InputError
from gptjax.runtime.process import default_workers
from gptjax.tokenizer.interface import RANKS_FILE, Tokenizer
from gptjax.tokenizer.splitting import PATTERNS, WORD_ENDS

_END = "<|endoftext|>"
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")
_LONGEST_SPACE = 1 << 18  # characters of white space in a row that the library's pattern matcher surely takes


@dataclass(frozen=True)
class _Published:
    """A file of ranks that is known by its content, and the settings that its makers publish apart from it."""

    name: str
    pattern: str
    specials: dict[str, int]
    ends: tuple[str, str] = (_END, _END)


def _llama3() -> dict[str, int]:
    """The 256 control tokens behind Llama 3's ranks, those in use by their names in Llama 3.1."""
    used = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
            7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}  # fmt: skip
    unused = iter(range(256))
    names = [used.get(i) or f"reserved_special_token_{next(unused)}" for i in range(256)]
    return {f"<|{name}|>": 128_000 + i for i, name in enumerate(names)}


# By the SHA-256 of the file.
PUBLISHED = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": _Published(
        "GPT-2's (r50k_base)", "gpt2", {_END: 50_256}
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": _Published(
        "p50k_base", "gpt2", {_END: 50_256}
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": _Published(
        "cl100k_base", "cl100k", {_END: 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259,
                                  "<|fim_suffix|>": 100_260, "<|endofprompt|>": 100_276}
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": _Published(
        "o200k_base", "o200k", {_END: 199_999, "<|endofprompt|>": 200_018}
    ),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": _Published(
        "Llama 3's", "cl100k", _llama3(), ("<|begin_of_text|>", "<|end_of_text|>")
    ),
}  # fmt: skip


class TiktokenTokenizer(Tokenizer):
    """Byte pairs by rank, given as the bytes of a file of ranks; the special tokens lie behind the ranks.

    A file that is not known by its content needs the name of its split pattern (tokenizer.pattern), and gets one
    special token behind its ranks, <|endoftext|>, which begins and ends documents. Ids are those of tiktoken's
    encode_ordinary, but where white space runs on for more than 262,144 characters, where it fails: there it is cut.
    """

    kind = "tiktoken"

    def __init__(self, content: bytes, pattern: str = "", name: str = "the file of ranks"):
        try:
            import tiktoken
        except ImportError:
            raise InputError(f"{name} needs the library tiktoken; pip install 'gptjax[bpe]'") from None

        ranks = _read_ranks(content, name)
        canonical = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
        hashes = [hashlib.sha256(data).hexdigest() for data in (content, canonical)]
        known = next((PUBLISHED[h] for h in hashes if h in PUBLISHED), None)
        if known is None and pattern not in PATTERNS:
            raise InputError(f"{name} has {len(ranks):,} ranks and is none of the known files; say how it splits text: "
                             f"add --tokenizer.pattern with one of {', '.join(PATTERNS)}")  # fmt: skip
        if known is not None and pattern not in ("", known.pattern):
            raise InputError(f"tokenizer.pattern={pattern!r}, but {name} is {known.name} file, whose pattern is "
                             f"{known.pattern}; leave tokenizer.pattern out")  # fmt: skip
        pattern = known.pattern if known else pattern
        behind = max(ranks.values()) + 1
        self.specials = dict(known.specials) if known else {_END: behind}
        ends = known.ends if known else (_END, _END)
        self.bos_id, self.eos_id = (self.specials[end] for end in ends)
        self.vocab_size = max(behind, *(i + 1 for i in self.specials.values()))
        self._bytes = [b""] * self.vocab_size
        for token, rank in ranks.items():
            self._bytes[rank] = token
        self.pattern = pattern
        self._content = {RANKS_FILE: content}
        self.sha256 = hashlib.sha256(content + (b"" if known else pattern.encode())).hexdigest()
        self.safe_cut = WORD_ENDS
        # No special tokens: nothing in a text can match one.
        self._encoding = tiktoken.Encoding(
            self.sha256, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
        )

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        pieces = [_cut_spaces(part) for part in parts]
        flat = [piece for row in pieces for piece in row]
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=default_workers()))
        return [[i for _ in row for i in next(encoded)] for row in pieces]

    def _described(self) -> dict[str, str]:
        return {"pattern": self.pattern}

    def ranks(self) -> dict[bytes, int]:
        """Token -> rank, in the order of ranks."""
        return {token: i for i, token in enumerate(self._bytes) if token}


def looks_like_ranks(start: bytes) -> bool:
    """True where a file that begins so is a file of ranks."""
    return _LINE.fullmatch(start.split(b"\n", 1)[0].rstrip(b"\r")) is not None


def _read_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Token -> rank in the order of ranks; raises InputError naming the line that is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not (line := line.rstrip(b"\r")):
            continue
        match = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if match is None or not token:
            raise InputError(f"{name}: line {number} is {line[:40]!r}; wanted base64 of a token, a space and its rank")
        if token in ranks:
            raise InputError(f"{name}: line {number} repeats the token of rank {ranks[token]}; the file is damaged")
        ranks[token] = int(match[2])
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(f"{name} has no token for byte 0x{missing[0]:02x}, so text would not come back as it was")
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    for (_, low), (_, high) in zip(ordered, ordered[1:]):
        if low == high:
            raise InputError(f"{name} has two tokens of rank {low}; the file is damaged")
    if ordered[-1][1] > 2 * len(ordered):
        raise InputError(f"{name} has rank {ordered[-1][1]} among {len(ordered)} tokens; the file is damaged")
    return dict(ordered)


def _cut_spaces(text: str) -> list[str]:
    """The text in one piece, but where white space runs on for longer than the library can match."""
    if len(text) <= _LONGEST_SPACE:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts += range(run.start() + _LONGEST_SPACE, run.end(), _LONGEST_SPACE)
    return [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)])]

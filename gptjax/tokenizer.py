"""Text to token ids and back, with nothing lost: raw bytes, or a SentencePiece model with byte fallback.

`decode(encode(text)) == text` for every string. Special tokens never come from text: a "<s>" in the text is encoded
as ordinary pieces. This is the only module that imports sentencepiece.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from gptjax.config import TokenizerConfig
from gptjax.settings import InputError

META_FILE = "tokenizer_meta.json"
MODEL_FILE = "tokenizer.model"
SCHEMA = 1

# SentencePiece writes a space as this character, so the character itself can only be spelled by its bytes.
SPACE_SYMBOL = "\u2581"

# What the trainer refuses in a sentence or gives another meaning; each is a byte piece of its own, or three.
_NOT_IN_PIECES = re.compile("[\0\t\n\r\u2581\u2585]+")
_MAX_SENTENCE = 4096  # characters; only training cuts sentences, so no text is lost


class Tokenizer(Protocol):
    """What every tokenizer gives: ids below vocab_size, of which bos_id and eos_id never come from text."""

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    sha256: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] = ()) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...

    def save(self, folder: Path) -> None: ...


class BytesTokenizer:
    """One token a UTF-8 byte; 256 begins a document and 257 ends it."""

    kind = "bytes"
    vocab_size = TokenizerConfig.BYTES_VOCAB
    bos_id = 256
    eos_id = 257
    sha256 = hashlib.sha256(b"gptjax bytes: 0 to 255 are bytes, 256 bos, 257 eos").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of the text; raises InputError where it holds half a surrogate pair."""
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] = ()) -> list[list[int]]:
        """Encodes each text for itself; `starts` changes nothing for bytes."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special ids render as nothing, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text; decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b)."""
        return bytes(i for i in _checked_ids(ids, self.vocab_size) if i < 256)

    def save(self, folder: Path) -> None:
        """Writes what `load` needs into the folder."""
        _write_meta(self, folder)


class SentencePieceTokenizer:
    """A SentencePiece model that can spell every text, given as the bytes of its .model file.

    Raises InputError where the model would lose text: no byte fallback, a normalisation, extra spaces removed.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the SentencePiece model"):
        import sentencepiece

        proto, self._bytes, self._adds_space = _read_model(model, name)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())  # pyright: ignore[reportCallIssue]
        self.vocab_size = len(self._bytes)
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise InputError(f"{name} has no tokens for the beginning and the end of a document; wanted both")
        self._symbol_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens; raises InputError where it holds half a surrogate pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] = ()) -> list[list[int]]:
        """Encodes each text for itself, on all cores; starts[i] is False where texts[i] goes on with a document."""
        parts: list[str] = []
        counts = []
        for i, text in enumerate(texts):
            _utf8(text)
            # A model of the Llama family writes a space before each document; decode takes it away again.
            adds = self._adds_space and text and (not starts or starts[i])
            split = (" " + text if adds else text).split(SPACE_SYMBOL)
            parts.extend(split)
            counts.append(len(split))
        encoded = iter(self._processor.encode(parts, out_type=int))
        result = []
        for count in counts:
            ids = list(next(encoded))
            for _ in range(count - 1):
                ids += self._symbol_ids
                ids += next(encoded)
            result.append(ids)
        return result

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special ids render as nothing, bytes that are not UTF-8 as U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text; decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b)."""
        return b"".join([self._bytes[i] for i in _checked_ids(ids, self.vocab_size)])

    def save(self, folder: Path) -> None:
        """Writes the model, and beside it what `load` checks it against."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model)
        _write_meta(self, folder)


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into the folder; raises InputError where a file is missing or was changed."""
    folder = Path(folder)
    path = folder / META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        kind, wanted = meta["kind"], meta["sha256"]
    except OSError as error:
        raise InputError(f"{path}: no tokenizer can be read here ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path}: wanted a JSON object with "kind" and "sha256"; the file is damaged') from None
    if kind not in ("bytes", "sentencepiece") or meta.get("schema") != SCHEMA:
        raise InputError(f"{path}: kind {kind!r} in schema {meta.get('schema')!r} is unknown; wanted schema {SCHEMA}")
    tokenizer = BytesTokenizer() if kind == "bytes" else load_model(folder / MODEL_FILE)
    if tokenizer.sha256 != wanted:
        file = folder / (MODEL_FILE if kind == "sentencepiece" else META_FILE)
        raise InputError(f"{file}: sha256 is {tokenizer.sha256[:12]}, wanted {wanted[:12]}; the file was changed")
    return tokenizer


def load_model(path: Path) -> SentencePieceTokenizer:
    """Reads a SentencePiece .model file; raises InputError where there is none or it would lose text."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"tokenizer file {path} cannot be read ({error.strerror}); wanted a .model file") from None
    return SentencePieceTokenizer(model, name=str(path))


def make_tokenizer(cfg: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer of the settings: bytes, the one at tokenizer.path, or one trained on the texts.

    The texts are read only for training. Raises InputError where the vocabulary is not tokenizer.vocab_size.
    """
    if cfg.kind == "bytes":
        return BytesTokenizer()
    if not cfg.path:
        return train_sentencepiece(texts, cfg.vocab_size)
    path = Path(cfg.path)
    tokenizer = load(path) if path.is_dir() else load_model(path)
    if tokenizer.kind != cfg.kind:
        raise InputError(f"tokenizer.path={cfg.path!r} holds a {tokenizer.kind} tokenizer; wanted {cfg.kind}")
    if tokenizer.vocab_size != cfg.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size={cfg.vocab_size}, but {cfg.path} has {tokenizer.vocab_size} tokens; "
            f"add --tokenizer.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains byte pairs (Sennrich et al. 2016) with byte fallback; the same texts give the same model.

    Newlines, tabs and control bytes are never part of a larger piece, so cutting a text after a newline does not
    change its ids. Raises InputError where the texts have too few different pieces for vocab_size.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _MAX_SENTENCE,  # in bytes; longer ones would be left out silently
            num_threads=2,  # a fixed number: it is written into the model and so into its sha256
            minloglevel=3,
        )
    except RuntimeError as error:
        raise InputError(_training_error(str(error), vocab_size)) from None
    return SentencePieceTokenizer(model.getvalue())


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        _utf8(text)
        for line in _NOT_IN_PIECES.split(text):
            for start in range(0, len(line), _MAX_SENTENCE):
                yield line[start : start + _MAX_SENTENCE]


def _training_error(message: str, vocab_size: int) -> str:
    """SentencePiece's message as one line that names our setting."""
    got = f"tokenizer.vocab_size={vocab_size}"
    if high := re.search(r"set it to a value <= (\d+)", message):
        largest = int(high[1])
        if largest < 300:
            return f"{got}: the training text is too small for any SentencePiece vocabulary; use --tokenizer.kind bytes"
        return f"{got}: the training text has pieces for at most {largest}; add --tokenizer.vocab-size {largest}"
    if low := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"{got}: the characters of the training text alone need {low[1]}; add --tokenizer.vocab-size {low[1]}"
    if "sentences_.empty()" in message:
        return f"{got}: there is no text to train the tokenizer on; wanted at least one line"
    return f"{got}: SentencePiece could not be trained: {' '.join(message.split())}"


def _read_model(model: bytes, name: str) -> tuple[Any, list[bytes], bool]:
    """The model with no space put before texts, the bytes that each id stands for, and whether it did put one."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise InputError(f"{name} is not a SentencePiece model; wanted the .model file that its trainer writes")
    normalizer = proto.normalizer_spec
    losses = {
        "has no byte fallback": not proto.trainer_spec.byte_fallback,
        "changes characters (its normalisation is not identity)": bool(normalizer.precompiled_charsmap),
        "removes extra spaces": normalizer.remove_extra_whitespaces,
        "does not mark spaces": not normalizer.escape_whitespaces,
        "marks spaces behind words": proto.trainer_spec.treat_whitespace_as_suffix,
    }
    for loss, found in losses.items():
        if found:
            raise InputError(f"{name} {loss}, so text would not come back as it was; use a model that loses nothing")
    adds_space, normalizer.add_dummy_prefix = normalizer.add_dummy_prefix, False
    kinds = proto.SentencePiece
    table = []
    for piece in proto.pieces:
        if piece.type == kinds.BYTE:
            table.append(bytes([int(piece.piece[3:5], 16)]))
        elif piece.type in (kinds.UNKNOWN, kinds.CONTROL, kinds.UNUSED):
            table.append(b"")
        else:
            table.append(piece.piece.replace(SPACE_SYMBOL, " ").encode())
    return proto, table, adds_space


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has half a surrogate pair, U+{ord(text[error.start]):04X}, at character {error.start}; "
            "wanted text that UTF-8 can write"
        ) from None


def _checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as a list; a negative one would pick a token from the end of the table."""
    ids = [int(i) for i in ids]
    if ids and not (0 <= min(ids) and max(ids) < vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise InputError(f"token id {bad} is outside the tokenizer's vocabulary; wanted 0 to {vocab_size - 1}")
    return ids


def _write_meta(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"schema": SCHEMA, "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    (folder / META_FILE).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

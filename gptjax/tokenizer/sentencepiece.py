"""SentencePiece models (Kudo and Richardson 2018) that lose nothing: BPE or unigram with byte fallback."""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.config.section import InputError, one_line
from gptjax.tokenizer.interface import MODEL_FILE, NOWHERE, SPACE_SYMBOL, Tokenizer, is_text, utf8

# Characters that the trainer refuses in a sentence or gives another meaning; each is a byte piece of its own, or three.
_NOT_IN_PIECES = re.compile("[\0\t\n\r\u2581\u2585]+")
_MAX_SENTENCE = 4096  # characters; only training cuts sentences, so no text is lost

_SHORT = 2000  # characters


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model that can spell every text, given as the bytes of its .model file.

    User-defined pieces other than white space and single characters are special: they never come from text. Raises
    InputError where the model would lose text: no byte fallback, a normalisation, extra spaces removed.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the SentencePiece model"):
        import sentencepiece

        proto = _read_model(model, name)
        self.adds_space, proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.add_dummy_prefix, False
        self._bytes, self.specials = _table(proto)
        self.model, self._content = model, {MODEL_FILE: model}
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())  # pyright: ignore[reportCallIssue]
        except RuntimeError as error:
            raise InputError(f"{name} can't be used by SentencePiece: {one_line(error, 100)}") from None
        self.vocab_size = len(self._bytes)
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise InputError(f"{name} has no tokens for the beginning and the end of a document; wanted both")
        self._atoms = {SPACE_SYMBOL: [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]}
        bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
        # A unigram model adds scores over the whole text, in float32: a cut can change how near ties are broken.
        self.safe_cut = cuts_between_pieces(self._bytes) if bpe else NOWHERE

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        if sum(map(len, parts)) < _SHORT:  # a list starts threads, which take longer than a few short texts
            return [self._processor.encode(part, out_type=int) for part in parts]
        return self._processor.encode(parts, out_type=int)

    def proto(self) -> Any:
        """The model's protocol buffer, in which pieces that never come from text are control pieces."""
        proto = _read_model(self.model, "the SentencePiece model")
        _table(proto)
        return proto


def cuts_between_pieces(pieces: list[bytes]) -> re.Pattern[str]:
    """Cuts that no merge of these pieces reaches across: before a space, after a newline, as far as they allow it."""
    cuts = []
    if not any(re.search(rb"[^ ] ", piece) for piece in pieces):
        cuts.append("(?<=[^ ])(?= )")
    if not any(re.search(rb"\n.", piece, re.DOTALL) for piece in pieces):
        cuts.append(r"(?<=\n)")
    return re.compile("|".join(cuts)) if cuts else NOWHERE


def train_sentencepiece(
    texts: Iterator[str], vocab_size: int, setting: str = "tokenizer.vocab_size"
) -> SentencePieceTokenizer:
    """Trains byte pairs (Sennrich et al. 2016) with byte fallback; the same texts give the same model.

    Newlines, tabs and control bytes are never part of a larger piece, so cutting a text after a newline does not
    change its ids. Raises InputError where the texts have too few different pieces for vocab_size, which it calls by
    the name of the `setting` that it came from.
    """
    import sentencepiece

    model, errors = io.BytesIO(), []

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(texts)
        except (Exception, KeyboardInterrupt) as error:  # SentencePiece would raise a RuntimeError of its text
            errors.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=sentences(),
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
        if errors:
            raise errors[0] from None
        raise InputError(_training_error(str(error), vocab_size, setting)) from None
    return SentencePieceTokenizer(model.getvalue())


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        utf8(text)
        for line in _NOT_IN_PIECES.split(text):
            for start in range(0, len(line), _MAX_SENTENCE):
                yield line[start : start + _MAX_SENTENCE]


def sentencepiece_model(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], bos: int, eos: int, *, adds_space: bool
) -> bytes:
    """A .model file of these byte pairs: pieces by id, their scores, and their types by SentencePiece's numbers.

    The model has byte fallback, changes no character, and begins a text with a space where `adds_space` is True.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for i, (piece, score, kind) in enumerate(zip(pieces, scores, kinds, strict=True)):
        proto.pieces.add(piece=piece, score=score, type=proto.SentencePiece.CONTROL if i in (bos, eos) else kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(pieces)
    trainer.bos_id, trainer.bos_piece, trainer.eos_id, trainer.eos_piece = bos, pieces[bos], eos, pieces[eos]
    unknown = next((i for i, kind in enumerate(kinds) if kind == proto.SentencePiece.UNKNOWN), -1)
    trainer.unk_id, trainer.unk_piece = unknown, pieces[unknown] if unknown >= 0 else ""
    normalizer.name, normalizer.add_dummy_prefix = "identity", adds_space
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return proto.SerializeToString()


def _training_error(message: str, vocab_size: int, setting: str) -> str:
    """SentencePiece's message as one line that names our setting."""
    got, flag = f"{setting}={vocab_size}", f"--{setting.replace('_', '-')}"
    if high := re.search(r"set it to a value <= (\d+)", message):
        largest = int(high[1])
        if largest < 300:
            return f"{got}: the training text is too small for any SentencePiece vocabulary; use --tokenizer.kind bytes"
        return f"{got}: the training text has pieces for at most {largest}; add {flag} {largest}"
    if low := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"{got}: the characters of the training text alone need {low[1]}; add {flag} {low[1]}"
    if "sentences_.empty()" in message:
        return f"{got}: there is no text to train the tokenizer on; wanted at least one line"
    return f"{got}: SentencePiece could not be trained: {' '.join(message.split())}"


def _read_model(model: bytes, name: str) -> Any:
    """The model's protocol buffer, if it loses nothing."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    spelt = [piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.BYTE]
    if not proto.pieces or any(re.fullmatch("<0x[0-9A-F]{2}>", piece) is None for piece in spelt):
        raise InputError(f"{name} is not a SentencePiece model; wanted the .model file that its trainer writes")
    normalizer = proto.normalizer_spec
    losses = {
        "has no byte fallback": not proto.trainer_spec.byte_fallback,
        "changes characters (its normalisation is not identity)": bool(normalizer.precompiled_charsmap),
        "removes extra spaces": normalizer.remove_extra_whitespaces,
        "does not mark spaces": not normalizer.escape_whitespaces,
        "marks spaces behind words": proto.trainer_spec.treat_whitespace_as_suffix,
    }
    for loss, present in losses.items():
        if present:
            raise InputError(f"{name} {loss}, so text would not come back as it was; use a model that loses nothing")
    return proto


def _table(proto: Any) -> tuple[list[bytes], dict[str, int]]:
    """The bytes that each id stands for, and the special pieces, which the model then no longer finds in text."""
    kinds = proto.SentencePiece
    table, specials = [], {}
    for i, piece in enumerate(proto.pieces):
        text = piece.piece.replace(SPACE_SYMBOL, " ")
        if piece.type == kinds.USER_DEFINED and not is_text(text):
            piece.type = kinds.CONTROL
        if piece.type == kinds.BYTE:
            table.append(bytes([int(piece.piece[3:5], 16)]))
        elif piece.type in (kinds.UNKNOWN, kinds.CONTROL, kinds.UNUSED):
            table.append(b"")
            if piece.type == kinds.CONTROL:
                specials[piece.piece] = i
        else:
            table.append(text.encode())
    return table, specials

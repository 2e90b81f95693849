"""The plainest tokenizer: one token a byte."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptjax.config import TokenizerConfig
from gptjax.tokenizer.interface import ANYWHERE, META_FILE, checked_ids, utf8, write_meta


class BytesTokenizer:
    """One token a UTF-8 byte; 256 begins a document and 257 ends it."""

    kind = "bytes"
    vocab_size = TokenizerConfig.BYTES_VOCAB
    bos_id = 256
    eos_id = 257
    sha256 = hashlib.sha256(b"gptjax bytes: 0 to 255 are bytes, 256 bos, 257 eos").hexdigest()
    specials = {"<s>": 256, "</s>": 257}
    files = (META_FILE,)
    safe_cut = ANYWHERE

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of the text; raises InputError where it holds half a surrogate pair."""
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] = ()) -> list[list[int]]:
        """Encodes each text for itself; `starts` changes nothing for bytes."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special ids render as nothing, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text; decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b)."""
        return bytes(i for i in checked_ids(ids, self.vocab_size) if i < 256)

    def save(self, folder: Path) -> None:
        """Writes the description that `load_tokenizer` reads into the folder."""
        write_meta(self, folder, {})

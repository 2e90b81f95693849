"""The plainest tokenizer: one token a byte."""

import hashlib

from gptjax.config import TokenizerConfig
from gptjax.tokenizer.interface import ANYWHERE, Tokenizer


class BytesTokenizer(Tokenizer):
    """One token a UTF-8 byte; 256 begins a document and 257 ends it."""

    kind = "bytes"
    vocab_size = TokenizerConfig.BYTES_VOCAB
    bos_id = 256
    eos_id = 257
    sha256 = hashlib.sha256(b"gptjax bytes: 0 to 255 are bytes, 256 bos, 257 eos").hexdigest()
    specials = {"<s>": 256, "</s>": 257}
    safe_cut = ANYWHERE
    _bytes = [*(bytes([byte]) for byte in range(256)), b"", b""]
    _content = {}

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        return [list(part.encode()) for part in parts]

"""Text that a tokenizer which loses something is likely to lose something of, and SentencePiece models of any kind."""

import io

from gptjax.data.sources import CORPORA

SHAKESPEARE = (CORPORA / "shakespeare.txt").read_bytes()[:150_000].decode()

AWKWARD = [
    "\u2585", "\u2047", "\x7f", "king", "The ", "<|endoftext|>", "<|im_start|>", "[INST]", "        ", "<s>", "</s>",
    "<unk>", "<0x41>", "<0x4", "\u2581", " \u2581\u2581", "\x00", "\r\n", "\n", "\n\n", "\t", "  ", " ", "'s", "'S",
    "don't", "DON'T", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\U0001f469\u200d\U0001f680", "\u4e2d\u6587",
    "\uff0c\n", "\u3002", "e\u0301", "\ufeff", "\ufffd", "\U0010ffff", "1234567", "_", "...", "),\n", "/",
    "The king",
]  # fmt: skip


def sentencepiece_model(text: str = SHAKESPEARE[:40_000], **changes) -> bytes:
    """A model of 400 pieces that loses nothing, trained as SentencePiece itself would, with some settings changed."""
    import sentencepiece

    model = io.BytesIO()
    lossless = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings = lossless | {"model_type": "bpe", "vocab_size": 400, "minloglevel": 3} | changes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.split("\n")), model_writer=model, **settings)
    return model.getvalue()

"""Pieces of text that a tokenizer which loses something is likely to lose something of."""

AWKWARD = [
    "\u2585", "\u2047", "\x7f", "king", "The ", "<|endoftext|>", "<|im_start|>", "[INST]", "        ", "<s>", "</s>",
    "<unk>", "<0x41>", "<0x4", "\u2581", " \u2581\u2581", "\x00", "\r\n", "\n", "\n\n", "\t", "  ", " ", "'s", "'S",
    "don't", "DON'T", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\U0001f469\u200d\U0001f680", "\u4e2d\u6587",
    "\uff0c\n", "\u3002", "e\u0301", "\ufeff", "\ufffd", "\U0010ffff", "1234567", "_", "...", "),\n", "/",
    "The king",
]  # fmt: skip

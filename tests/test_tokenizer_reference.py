"""What is published of tokenizers, and the same ids on real text.

Real text is read from the folder that GPTJAX_SHARED_DATA names, where it is set. It holds tokenizers/
(encoder.json, vocab.bpe, mistral_v1.model) and text/ (JSONL with gzip).
"""

import base64
import gzip
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from gptjax.tokenizer import load_sentencepiece, open_tokenizer
from gptjax.tokenizer.splitting import PATTERNS, WORD_ENDS
from gptjax.tokenizer.tiktoken import PUBLISHED, TiktokenTokenizer

tiktoken = pytest.importorskip("tiktoken", reason="needs the extra gptjax[bpe]")
pytest.importorskip("tokenizers", reason="needs the extra gptjax[bpe]")

DATA = Path(os.environ.get("GPTJAX_SHARED_DATA", ""))
END = "<|endoftext|>"
# As OpenAI publishes it for GPT-2; the one that the library uses is another spelling of it.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
needs_data = pytest.mark.skipif(
    "GPTJAX_SHARED_DATA" not in os.environ, reason="GPTJAX_SHARED_DATA names no folder with tokenizers/ and text/"
)


@pytest.fixture(scope="module")
def reference():
    """tiktoken's own GPT-2, its ranks read from the two files by tiktoken itself."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    files = DATA / "tokenizers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # read the files themselves
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(files / "vocab.bpe"), encoder_json_file=str(files / "encoder.json")
        )
    return tiktoken.Encoding(
        "gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 50_256}, explicit_n_vocab=50_257
    )


@pytest.fixture(scope="module")
def mixed() -> list[str]:
    """A megabyte or more of documents: English, Chinese, code, emoji, control characters and special tokens."""
    documents = []
    for name in ("brown", "tang_song_300", "manpages_zh", "linux_kernel_docs_zh", "python_docs", "git_docs"):
        size = 0
        with gzip.open(DATA / "text" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                documents.append(json.loads(line)["text"])
                size += len(documents[-1].encode())
                if size > 170_000:
                    break
    rng = random.Random(0)
    emoji = [chr(rng.choice([0x200D, 0xFE0F, *range(0x1F300, 0x1F700)])) for _ in range(4000)]
    control = [chr(rng.randrange(0xA0)) for _ in range(20_000)]
    spaces = rng.choices(["\n", " ", "\r\n", "\t", "\u3000", "\xa0", "x", END, "'s", "\x1c"], k=20_000)
    anything = [chr(c) for c in rng.choices(range(0x110000), k=20_000) if not 0xD800 <= c < 0xE000]
    return documents + ["".join(made) for made in (emoji, control, spaces, anything)]


@needs_data
@pytest.mark.slow
def test_gpt2s_ids_are_tiktokens_on_a_megabyte_of_mixed_text(reference, mixed, capsys):
    dump = b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in reference._mergeable_ranks.items())
    ours = {"two files": open_tokenizer(DATA / "tokenizers" / "encoder.json"), "ranks": TiktokenTokenizer(dump)}
    wanted = [reference.encode_ordinary(text) for text in mixed]
    size, tokens = sum(len(text.encode()) for text in mixed), sum(map(len, wanted))
    assert size > 1_000_000
    for name, tokenizer in ours.items():
        got = tokenizer.encode_batch(mixed)
        different = sum(a != b for x, y in zip(got, wanted) for a, b in itertools.zip_longest(x, y))
        lost = sum(tokenizer.decode(ids) != text for ids, text in zip(got, mixed))
        with capsys.disabled():
            print(
                f"\n{name}: {size:,} bytes, {tokens:,} tokens, {different} different, {lost} of {len(mixed)} texts lost"
            )
        assert (different, lost) == (0, 0)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50_257, 50_256, 50_256)
        assert not any(50_256 in ids for ids in got)


@needs_data
@pytest.mark.slow
def test_mistrals_ids_are_sentencepieces_and_nothing_is_lost(mixed):
    import sentencepiece

    path = DATA / "tokenizers" / "mistral_v1.model"
    tokenizer, reference = load_sentencepiece(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in mixed:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if "\u2581" not in text:
            assert ids == reference.encode(text)


def whole_words(texts: list[str]) -> dict[bytes, int]:
    """Ranks with which every word of these texts is one token, so that ids show where words end."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for text in map(str.encode, texts):
        for size in range(2, len(text) + 1):
            for start in range(len(text) - size + 1):
                ranks.setdefault(text[start : start + size], len(ranks))
    return ranks


def test_words_end_where_every_published_pattern_ends_them():
    behind = ["", "s", " x", "\n\n", "5", "'s", "\u0301", "   "]
    at = [*map(chr, range(0x20, 0x7F)), "\n", *"\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"]
    texts = [f"so{before}{mark}{rest}" for before in "aZ\u4e2d\u00b25" for mark in at for rest in behind]
    cut = [text for text in texts if any(m.start() == 3 for m in WORD_ENDS.finditer(text))]
    assert len(cut) == 5 * 8 * 15
    ranks = whole_words(texts)
    for name, pattern in PATTERNS.items():
        encode = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary
        assert len(encode("soas")) == 1  # one word, one token
        for text in cut:
            assert encode(text) == encode(text[:3]) + encode(text[3:]), (name, text)


@pytest.mark.parametrize("name", ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_what_is_known_of_published_files_is_what_the_library_says(name, monkeypatch):
    from tiktoken_ext import openai_public

    hashes = []
    parts = ["\0", "\r\n", "\n", "\t", "  ", " ", "'s", "'S", "don't", "DON'T", "\x1c", "\x85", "\xa0", "\u2028",
             "\u3000", "\u4e2d\u6587", "\uff0c\n", "e\u0301", "1234567", "_", "...", "),\n", "/", "Ab", "\u01c5",
             "\u00aa", "\u0660", END]  # fmt: skip

    def ranks_without_download(url, expected_hash):
        hashes.append(expected_hash)
        return whole_words(parts)

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", ranks_without_download)
    theirs = openai_public.ENCODING_CONSTRUCTORS[name]()
    ours = PUBLISHED[hashes[0]]
    assert ours.specials == theirs["special_tokens"]
    encodings = [
        tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=theirs["mergeable_ranks"], special_tokens={})
        for pattern in (theirs["pat_str"], PATTERNS[ours.pattern])
    ]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(parts, k=12))
        assert len({tuple(encoding.encode_ordinary(text)) for encoding in encodings}) == 1, text


def test_llama_3_has_256_special_tokens_behind_its_ranks():
    llama = next(file for file in PUBLISHED.values() if "Llama" in file.name)
    assert sorted(llama.specials.values()) == list(range(128_000, 128_256))
    assert llama.specials["<|eot_id|>"] == 128_009 and llama.specials["<|reserved_special_token_247|>"] == 128_255

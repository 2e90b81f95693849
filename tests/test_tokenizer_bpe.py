"""Laws of the byte pair encoders made elsewhere: tokenizer.json, GPT-2's two files, tiktoken's ranks, SentencePiece."""

import json
import random
import sys
import unicodedata

import pytest
from awkward_texts import AWKWARD

from gptjax.config import TokenizerConfig
from gptjax.config.section import InputError
from gptjax.tokenizer import (
    BytesTokenizer,
    SentencePieceTokenizer,
    last_safe_cut,
    load_tokenizer,
    make_tokenizer,
    open_tokenizer,
    train_sentencepiece,
)
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer
from gptjax.tokenizer.splitting import PATTERNS
from gptjax.tokenizer.tiktoken import TiktokenTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra gptjax[bpe]")
tiktoken = pytest.importorskip("tiktoken", reason="needs the extra gptjax[bpe]")

from byte_pairs import (  # noqa: E402 : after what it needs was looked for
    END,
    LLAMA,
    MERGES,
    PLAIN,
    RANKS,
    ROLE,
    SPACES,
    TEXT,
    TOKENIZERS,
    TWO_FILES,
    VOCAB,
    byte_level_json,
    from_json,
    llama_json,
    llama_model,
    ranks_file,
)


def test_neither_merges_nor_whole_words_make_a_special_token():
    token = next(token for token in VOCAB if len(token) > 3 and token.isalpha() and token.isascii())
    values = byte_level_json()
    values["added_tokens"] += [{"id": VOCAB[token], "content": token, "special": False}]
    # With no pattern the whole text is one word, which ignore_merges looks up as it is.
    values["pre_tokenizer"] = values["pre_tokenizer"]["pretokenizers"][1]
    tokenizer = from_json(values)
    assert VOCAB[token] in TOKENIZERS["two files"].encode(token)
    for text in (token, token + "x", END):
        assert {VOCAB[token], VOCAB[END]}.isdisjoint(tokenizer.encode(text)) and tokenizer.decode(
            tokenizer.encode(text)
        ) == text


def test_text_that_looks_like_the_name_of_a_byte_is_text():
    values = llama_json(LLAMA, legacy=False)
    vocab, parts = values["model"]["vocab"], ["<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "1>"]
    vocab |= {part: len(vocab) + i for i, part in enumerate(part for part in parts if part not in vocab)}
    pairs = [("<", "0"), ("<0", "x"), ("<0x", "4"), ("1", ">"), ("<0x4", "1>")]
    values["model"]["merges"] = pairs + values["model"]["merges"]
    tokenizer = from_json(values)
    assert tokenizer.decode(tokenizer.encode("a<0x41>")) == "a<0x41>"


def test_tokens_that_may_stand_for_a_role_are_special():
    for name in ("tokenizer.json", "llama, legacy", "llama, metaspace", "sentencepiece", "unigram"):
        assert {ROLE, PLAIN} <= TOKENIZERS[name].specials.keys()
    assert "".join(TOKENIZERS["sentencepiece"].decode([i]) for i in TOKENIZERS["sentencepiece"].specials.values()) == ""


def test_safe_cuts_are_found_in_ordinary_text_and_the_last_one_is_taken():
    text = TEXT[:5000]
    for name, tokenizer in TOKENIZERS.items():
        cut = last_safe_cut(tokenizer, text)
        places = [m.start() for m in tokenizer.safe_cut.finditer(text) if 0 < m.start() < len(text)]
        assert cut == max(places, default=0) and (cut > 4900) == (name != "unigram"), name
    assert last_safe_cut(TOKENIZERS["two files"], "a b" + "\n" * 100_000) == 3
    assert last_safe_cut(TOKENIZERS["two files"], "\u4e2d\u6587\uff0c\u4e2d") == 2
    assert [last_safe_cut(BytesTokenizer(), text) for text in ("", "a", "ab")] == [0, 0, 1]
    assert last_safe_cut(train_sentencepiece(iter([TEXT[:50_000]]), 400), "\u4e2d\n\n\u4e2d") == 3


def test_ids_are_those_of_tiktoken():
    whole = TEXT + "".join(AWKWARD) * 3 + "".join(random.Random(0).choices(AWKWARD, k=6000))
    for pattern in PATTERNS:
        special = {END: VOCAB[END]}
        reference = tiktoken.Encoding("tiny", pat_str=PATTERNS[pattern], mergeable_ranks=RANKS, special_tokens=special)
        ours = TiktokenTokenizer(ranks_file(RANKS), pattern)
        assert ours.encode(whole) == reference.encode_ordinary(whole)
        assert pattern != "gpt2" or TOKENIZERS["two files"].encode(whole) == ours.encode(whole)
        assert (ours.bos_id, ours.vocab_size) == (VOCAB[END], len(VOCAB))


def test_ids_are_those_of_the_library_with_no_special_token_in_the_text():
    reference = tokenizers.Tokenizer.from_str(json.dumps(byte_level_json()))
    for text in (TEXT[:20_000], "a" + SPACES + "b" + SPACES * 2 + " ", SPACES, "x\n\n\n y"):
        ids = TOKENIZERS["tokenizer.json"].encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
    assert len(VOCAB) + 2 in TOKENIZERS["tokenizer.json"].encode("a" + SPACES + "b")


def test_a_llama_model_has_the_same_ids_in_either_form():
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=LLAMA)
    for text in ("", "To be", " or not", "a\n  b", "\u4e2d \u6587", TEXT[:20_000]):
        for name in ("llama, legacy", "llama, metaspace", "sentencepiece"):
            assert TOKENIZERS[name].encode(text) == reference.encode(text), name


def test_the_ends_of_a_document_are_found(tmp_path):
    llama = llama_json(LLAMA, legacy=True)
    assert (TOKENIZERS["llama, legacy"].bos_id, TOKENIZERS["llama, legacy"].eos_id) == (1, 2)
    assert (TOKENIZERS["two files"].bos_id, TOKENIZERS["two files"].eos_id) == (VOCAB[END], VOCAB[END])
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama))
    role, plain = (llama["model"]["vocab"][token] for token in (ROLE, PLAIN))
    for ends, ids in (
        ({"bos_token": ROLE, "eos_token": {"content": PLAIN}}, (role, plain)),
        ({"bos_token": None, "eos_token": PLAIN}, (1, plain)),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(ends))
        tokenizer = open_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == ids
        tokenizer.save(tmp_path / "saved")
        assert (load_tokenizer(tmp_path / "saved").bos_id, load_tokenizer(tmp_path / "saved").eos_id) == ids
    spaces = from_json(byte_level_json(), eos=SPACES)
    assert spaces.eos_id not in spaces.encode("a" + SPACES) and spaces.decode(spaces.encode(SPACES)) == SPACES
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<fin>"}')
    with pytest.raises(InputError, match="no token '<fin>'"):
        open_tokenizer(tmp_path)


SEQUENCE = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}]}
ISOLATED = byte_level_json()["pre_tokenizer"]["pretokenizers"][0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"normalizer": {"type": "BertNormalizer", "lowercase": False}}, "normalizer BertNormalizer"),
        ({"normalizer": SEQUENCE}, "normalizer Replace"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "pre_tokenizer BertPreTokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "adds a space"),
        ({"pre_tokenizer": ISOLATED | {"behavior": "Removed"}}, "leaves out"),
        ({"pre_tokenizer": ISOLATED}, "neither byte-level"),
        ({"pre_tokenizer": None}, "neither byte-level"),
        ({"pre_tokenizer": ["ByteLevel"]}, "wanted steps"),
        ({"model": {"type": "WordPiece", "vocab": VOCAB, "unk_token": "[UNK]"}}, "a WordPiece model"),
        ({"model": {"type": "WordLevel", "vocab": VOCAB}}, "a WordLevel model"),
        ({"model": {"type": "Unigram", "vocab": []}}, "a Unigram model.*SentencePiece"),
        ({"model": {"type": "BPE", "vocab": VOCAB, "merges": MERGES, "dropout": 0.1}}, "dropout"),
        ({"model": {"type": "BPE", "vocab": VOCAB, "merges": MERGES, "end_of_word_suffix": "</w>"}}, "</w>"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "stands for a byte"),
        ({"model": {"type": "BPE", "vocab": VOCAB, "merges": 3}}, "model.merges"),
        ({"model": {"type": "BPE", "vocab": VOCAB | {"a": -1}, "merges": MERGES}}, "model.vocab"),
        ({"model": {"type": "BPE", "vocab": VOCAB | {"xyz": 5}, "merges": MERGES}}, "same id"),
        ({"model": {"type": "BPE", "vocab": VOCAB, "merges": [["xx", "yy"]]}}, "can't be used"),
        ({"model": 7}, "no tokenizer.json"),
        ({"added_tokens": []}, "begins or ends"),
        ({"added_tokens": [{"id": 1.5, "content": "x"}]}, "added_tokens"),
        ({"added_tokens": [{"id": 900, "content": "  ", "rstrip": True}]}, "takes text away"),
    ],
)
def test_a_tokenizer_json_that_loses_text_is_refused_and_says_why(changes, says):
    with pytest.raises(InputError, match=says) as error:
        from_json(byte_level_json(**changes))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("normalizer", [{"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}])
def test_composing_is_left_out_text_comes_back_and_composed_text_has_the_same_ids(normalizer):
    values = byte_level_json(normalizer=normalizer)
    ours, theirs = from_json(values), tokenizers.Tokenizer.from_str(json.dumps(values))
    for text in ("A\u0308 e\u0301", "\u00c4 \u00e9 \u4e2d\u6587", TEXT[:3000]):
        assert ours.decode(ours.encode(text)) == text
        composed = unicodedata.normalize("NFC", text)
        assert ours.encode(composed) == theirs.encode(text, add_special_tokens=False).ids


def test_added_tokens_beside_a_sentencepiece_model_are_not_lost(tmp_path):
    values = llama_json(LLAMA, legacy=False)
    size = max(values["model"]["vocab"].values()) + 1
    (tmp_path / "tokenizer.model").write_bytes(LLAMA)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert open_tokenizer(tmp_path).kind == "sentencepiece"
    values["added_tokens"] += [{"id": size, "content": "<|user|>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert open_tokenizer(tmp_path).specials["<|user|>"] == size
    assert open_tokenizer(tmp_path, "sentencepiece").kind == "sentencepiece"
    (tmp_path / "tokenizer.json").write_text("{")
    assert open_tokenizer(tmp_path).kind == "sentencepiece"


def test_what_looks_harmless_and_loses_text_is_found_by_trying():
    hidden = byte_level_json(added_tokens=[{"id": VOCAB[END], "content": END, "special": True}])
    hidden["model"] = hidden["model"] | {"vocab": {t: 0 if t == "\u0120" else i for t, i in VOCAB.items() if i}}
    with pytest.raises(InputError):
        from_json(hidden)
    with pytest.raises(InputError, match="gives '.*' back as"):
        from_json(byte_level_json(), bos="A", eos=END)  # a letter that may not come from text


def test_white_space_of_any_length_comes_back():
    for name, text in (("tiktoken", " " * 1_010_000 + "x"), ("tiktoken o200k", "y" + "\n" * 1_010_000 + " z")):
        assert TOKENIZERS[name].decode(TOKENIZERS[name].encode(text)) == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"IQ== 0\nIg== x\n", "line 2"),
        (b"IQ== 0\n!!!! 1\n", "line 2"),
        (b"IQ== 0\nIQ== 1\n", "line 2 repeats"),
        (b"IQ== 0\n", "byte 0x00"),
        (ranks_file(RANKS | {b"zzzz": 5}), "two tokens of rank 5"),
        (ranks_file(RANKS | {b"zzzz": 99_999_999}), "99999999"),
        (ranks_file(RANKS), "none of the known files.*--tokenizer.pattern"),
    ],
)
def test_a_damaged_or_unknown_file_of_ranks_is_refused(content, says):
    with pytest.raises(InputError, match=says) as error:
        TiktokenTokenizer(content)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_the_file_say_what_to_type(tmp_path):
    for name, content in {
        **TWO_FILES,
        "own.tiktoken": ranks_file(RANKS),
        "tokenizer.model": LLAMA,
        "text": b"?",
    }.items():
        (tmp_path / name).write_bytes(content)
    size = len(VOCAB)

    def make(kind, path="", **more):
        settings = {"kind": kind, "vocab_size": size, "path": str(tmp_path / path)} | more
        return make_tokenizer(TokenizerConfig(**settings), iter(()))

    for path in ("", "vocab.json", "merges.txt"):
        assert make("huggingface", path).kind == "huggingface"
    for path in ("", "own.tiktoken"):
        assert make("tiktoken", path, pattern="gpt2").kind == "tiktoken"
    for path in ("", "tokenizer.model"):
        assert make("sentencepiece", path, vocab_size=700).kind == open_tokenizer(tmp_path).kind == "sentencepiece"
    make("tiktoken", pattern="gpt2").save(tmp_path / "saved")
    for arguments, more, says in (
        (("huggingface", "own.tiktoken"), {}, "--tokenizer.kind tiktoken"),
        (("sentencepiece", "vocab.json"), {}, "--tokenizer.kind huggingface"),
        (("tiktoken", "tokenizer.model"), {}, "--tokenizer.kind sentencepiece"),
        (("huggingface", "saved"), {}, "--tokenizer.kind tiktoken"),
        (("tiktoken", "saved"), {"pattern": "o200k"}, "saved with 'gpt2'"),
        (("huggingface",), {"vocab_size": 50_257}, f"--tokenizer.vocab-size {size}"),
        (("huggingface", "absent"), {}, "absent cannot be read"),
        (("sentencepiece", "text"), {}, "text is not a SentencePiece model"),
        (("sentencepiece",), {"vocab_size": 512}, "vocab_size=512.* 700 .*--tokenizer.vocab-size 700"),
        (("huggingface",), {"pattern": "gpt2"}, "tokenizer.pattern='gpt2'"),
        (("huggingface",), {"vocab_size": 200}, "at least 257"),
        (("tiktoken", "saved/tokenizer_meta.json"), {}, "--tokenizer.kind huggingface"),
    ):
        with pytest.raises(InputError, match=says) as error:
            make(*arguments, **more)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="tokenizer.path is empty.*add --tokenizer.path"):
        make_tokenizer(TokenizerConfig(kind="tiktoken", vocab_size=size), iter(()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no tokenizer; wanted"):
        open_tokenizer(tmp_path / "empty")
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(InputError, match="added_tokens.json"):
        make("huggingface")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vocab.json", b"{", "not JSON"),
        ("vocab.json", b'{"\xff": 1}', "not UTF-8"),
        ("vocab.json", b"[]", "JSON object"),
        ("merges.txt", b"#version: 0.2\nt\n", "line 2"),
        ("merges.txt", b"\xc4\xa0 zzz\n", "line 1"),
    ],
)
def test_damaged_files_of_a_byte_pair_encoder_are_named(name, content, says):
    with pytest.raises(InputError, match=says):
        HuggingFaceTokenizer(TWO_FILES | {name: content})


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken"])
def test_a_missing_library_names_the_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library}; pip install 'gptjax\[bpe\]'"):
        HuggingFaceTokenizer(TWO_FILES) if library == "tokenizers" else TiktokenTokenizer(ranks_file(RANKS), "gpt2")


def test_white_space_and_single_characters_that_a_model_defines_are_text():
    model = SentencePieceTokenizer(llama_model(user_defined_symbols=["\u2581\u2581", "\u6587", "\ue000", ROLE]))
    assert set(model.specials) == {"<s>", "</s>", "\ue000", ROLE}
    assert model.decode(model.encode("  \u6587\ue000" + ROLE)) == "  \u6587\ue000" + ROLE
    assert len(model.encode("\u6587")) == 2

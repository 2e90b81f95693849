"""Laws of the tokenizers: nothing is lost, and text never becomes a special token."""

import pickle
from importlib.util import find_spec

import pytest
from awkward_texts import AWKWARD, sentencepiece_model
from awkward_texts import SHAKESPEARE as TEXT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.config.section import InputError
from gptjax.tokenizer import (
    META_FILE,
    MODEL_FILE,
    BytesTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    open_tokenizer,
    train_sentencepiece,
)

latin = st.binary(max_size=60).map(lambda data: data.decode("latin-1"))
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8), latin), max_size=14).map("".join)


TRAINED = train_sentencepiece(iter([TEXT]), 400)
LLAMA_LIKE = SentencePieceTokenizer(sentencepiece_model())
TOKENIZERS = {"bytes": BytesTokenizer(), "trained": TRAINED, "one that adds a space": LLAMA_LIKE}
if find_spec("tokenizers") and find_spec("tiktoken"):  # the extra gptjax[bpe]
    import byte_pairs

    TOKENIZERS |= byte_pairs.TOKENIZERS
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(text=texts)
@example(text="")
@example(text="<|endoftext|><|im_start|>[INST]<s>")
@example(text="<|im_start|>")
def test_decoding_gives_back_every_text_and_no_special_token_comes_from_it(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.specials.values()}.isdisjoint(ids)


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 699), max_size=12), at=st.integers(0, 12))
def test_bytes_of_joined_ids_are_the_joined_bytes(tokenizer, ids, at):
    ids = [i % tokenizer.vocab_size for i in ids]
    whole = tokenizer.decode_bytes(ids)
    assert whole == tokenizer.decode_bytes(ids[:at]) + tokenizer.decode_bytes(ids[at:])
    assert isinstance(tokenizer.decode(ids), str)  # any ids, also halves of characters


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(text=texts)
@example(text="a\n\nb\n\n\n  c")
@example(text="x),\n\ny. z\u4e2d\u3002\n")
def test_a_safe_cut_does_not_change_the_ids(tokenizer, text):
    whole = tokenizer.encode(text)
    for match in tokenizer.safe_cut.finditer(text):
        parts = [text[: match.start()], text[match.start() :]]
        first, rest = tokenizer.encode_batch(parts, starts=[True, False])
        assert first + rest == whole, parts


def test_no_piece_reaches_across_a_newline_a_tab_or_a_control_byte():
    text = TEXT[:60_000].replace(" t", "\tt").replace(" a", "\0a").replace(" o", "\ro")
    trained = train_sentencepiece(iter([text]), 400)
    pieces = [trained.decode_bytes([i]) for i in range(400)]
    assert not [piece for piece in pieces if len(piece) > 1 and set(piece) & set(b"\n\t\0\r")]


@every_tokenizer
def test_special_ids_render_as_nothing(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("To be"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "To be"


@every_tokenizer
@settings(max_examples=25, deadline=None)
@given(many=st.lists(texts, max_size=4))
@example(many=["", "To be", "<|endoftext|>", " or\n", " " * 8 + "x" + " " * 8])
def test_a_batch_is_encoded_as_each_text_for_itself(tokenizer, many):
    assert tokenizer.encode_batch(many) == [tokenizer.encode(text) for text in many]


@every_tokenizer
def test_pieces_of_a_document_decode_to_the_document(tokenizer):
    pieces = [" and so", " on\n", "to the end"]
    ids = tokenizer.encode_batch(pieces, starts=[True, False, False])
    assert tokenizer.decode(i for piece in ids for i in piece) == "".join(pieces)


def test_the_same_text_trains_the_same_model():
    again = train_sentencepiece(iter([TEXT]), 400)
    assert again.sha256 == TRAINED.sha256
    assert train_sentencepiece(iter([TEXT[:100_000]]), 400).sha256 != TRAINED.sha256


@pytest.mark.parametrize("between", ["\n", " ", "\t", "\r\n"])
def test_pieces_are_learned_however_lines_end(between):
    text = TEXT[:60_000].replace("\n", between)  # with spaces, one line of 60,000 characters
    trained = train_sentencepiece(iter([text]), 400)
    assert trained.vocab_size == 400 and len(trained.encode(text)) < 0.7 * len(text)


@every_tokenizer
def test_a_saved_tokenizer_is_loaded_as_it_was_and_a_changed_file_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tokenizer.files)
    for loaded in (load_tokenizer(tmp_path), open_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert loaded.encode(TEXT[:2000]) == tokenizer.encode(TEXT[:2000])
        for name in ("kind", "sha256", "vocab_size", "bos_id", "eos_id", "specials"):
            assert getattr(loaded, name) == getattr(tokenizer, name)
    changed = tmp_path / tokenizer.files[-1]
    content = changed.read_bytes()
    changed.write_bytes(content + b"\n" if tokenizer.files[1:] else content[:-2])
    with pytest.raises(InputError, match="sha256|SentencePiece|damaged"):
        load_tokenizer(tmp_path)
    changed.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_another_model_under_the_same_name_is_refused(tmp_path):
    TRAINED.save(tmp_path)
    train_sentencepiece(iter([TEXT[:100_000]]), 400).save(tmp_path / "other")
    (tmp_path / MODEL_FILE).write_bytes((tmp_path / "other" / MODEL_FILE).read_bytes())
    with pytest.raises(InputError, match=f"{MODEL_FILE}: sha256"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"kind": "bytes"}', '{"kind": "words", "sha256": "", "schema": 1}']
)
def test_a_damaged_description_is_named(tmp_path, content):
    (tmp_path / META_FILE).write_text(content)
    with pytest.raises(InputError, match=META_FILE):
        load_tokenizer(tmp_path)


def test_too_little_text_says_the_largest_vocabulary_and_that_one_works():
    with pytest.raises(InputError, match="tokenizer.vocab_size=4096.*at most") as error:
        train_sentencepiece(iter([TEXT[:4000]]), 4096)
    largest = int(str(error.value).rsplit(" ", 1)[1])
    assert train_sentencepiece(iter([TEXT[:4000]]), largest).vocab_size == largest


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, OSError])
def test_an_error_of_the_text_comes_out_of_the_training_of_a_tokenizer_as_it_is(error):
    def texts():
        yield TEXT[:1000]
        raise error("the text")

    with pytest.raises(error, match="^the text$"):
        train_sentencepiece(texts(), 400)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no text"), ("\n\n", "no text"), ("ab", "too small"), ("".join(map(chr, range(0x4E00, 0x5000))), "need 771")],
)
def test_what_cannot_be_trained_is_one_line(text, says):
    with pytest.raises(InputError, match=says) as error:
        train_sentencepiece(iter([text]), 400)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"byte_fallback": False}, "byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalisation"),
        ({"remove_extra_whitespaces": True}, "extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "behind words"),
        ({"bos_id": -1}, "beginning"),
    ],
)
def test_a_model_that_loses_text_is_refused(changes, says):
    with pytest.raises(InputError, match=says):
        SentencePieceTokenizer(sentencepiece_model(**changes))


@every_tokenizer
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=f"token id {bad} "):
            tokenizer.decode([0, bad])


@every_tokenizer
def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"U\+D800, at character 2"):
        tokenizer.encode("ab\ud800")

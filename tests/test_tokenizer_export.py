"""Laws of tokenizers written for transformers: the same ids through the tokenizers library, or nothing is written."""

import json
import random
import sys

import pytest
from awkward_texts import AWKWARD, SHAKESPEARE, sentencepiece_model

from gptjax.config.section import InputError
from gptjax.tokenizer import BytesTokenizer, SentencePieceTokenizer, open_tokenizer, set_template, train_sentencepiece

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra gptjax[bpe]")
pytest.importorskip("tiktoken", reason="needs the extra gptjax[bpe]")

import byte_pairs  # noqa: E402 : after what it needs was looked for

from gptjax.tokenizer.export import write_tokenizer  # noqa: E402

CHATML = ["<|im_start|>", "<|im_end|>"]
KINDS = byte_pairs.TOKENIZERS | {
    "bytes": BytesTokenizer(),
    "trained": train_sentencepiece(iter([SHAKESPEARE]), 400),
    "one that adds a space": SentencePieceTokenizer(sentencepiece_model()),
    "one with text of its own": SentencePieceTokenizer(
        sentencepiece_model(add_dummy_prefix=False, user_defined_symbols=["\u2581\u2581", "\u6587", *CHATML])
    ),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def texts_for(tokenizer, loses_space: bool) -> list[str]:
    """Texts in which no special token is named, and no character that the form can't tell from another."""
    rng = random.Random(0)
    texts = [SHAKESPEARE[:3000], *AWKWARD]
    texts += ["".join(rng.choices([*AWKWARD, *"abc .\n"], k=rng.randint(1, 12))) for _ in range(300)]
    texts += ["".join(chr(rng.randrange(0x20, 0xD800)) for _ in range(20)) for _ in range(100)]
    texts = [text.lstrip(" ") if loses_space else text for text in texts]
    return [text for text in texts if "\u2581" not in text and not any(name in text for name in tokenizer.specials)]


@every_kind
def test_the_library_gives_the_ids_that_the_tokenizer_gives(name, tmp_path):
    tokenizer = KINDS[name]
    write_tokenizer(tokenizer, tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = texts_for(tokenizer, loses_space=name == "llama, metaspace")
    assert len(texts) > 200
    for text in texts:
        ids = tokenizer.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == ids, text
        assert made.encode(text).ids == tokenizer.prompt_ids(text) or not text
        assert made.decode(ids).removeprefix(" " * tokenizer.adds_space) == text or tokenizer.adds_space
    for special, i in tokenizer.specials.items():
        assert made.encode(f"a{special}", add_special_tokens=False).ids[-1] == i
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ids = [made.token_to_id(config[end]) for end in ("bos_token", "eos_token")]
    assert ids == [tokenizer.bos_id, tokenizer.eos_id] and config["add_bos_token"] == tokenizer.begins


@every_kind
def test_what_is_written_is_read_again_with_the_same_ids(name, tmp_path):
    tokenizer = KINDS[name]
    write_tokenizer(tokenizer, tmp_path)
    again = open_tokenizer(tmp_path)
    text = SHAKESPEARE[:2000] + "  \n\u4e2d\u6587 12345"
    assert again.encode(text) == tokenizer.encode(text) and again.vocab_size == tokenizer.vocab_size
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_prompt_begins_there_as_it_does_here(tmp_path):
    tokenizer = SentencePieceTokenizer(sentencepiece_model())
    tokenizer.begins = False
    write_tokenizer(tokenizer, tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.encode("To be").ids == tokenizer.prompt_ids("To be")


def test_a_tokenizer_that_would_give_other_ids_is_not_written(tmp_path):
    class Other(BytesTokenizer):
        def _encode_parts(self, parts):
            return [list(part.upper().encode()) for part in parts]

    with pytest.raises(InputError, match=r"tokenizer.json would give '.*' other ids than this bytes tokenizer"):
        write_tokenizer(Other(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"tokenizers; pip install 'gptjax\[bpe\]'"):
        write_tokenizer(BytesTokenizer(), tmp_path)


@pytest.mark.peers
@every_kind
def test_transformers_gives_the_same_ids_and_chats(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = open_tokenizer_with_chat(name)
    write_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts_for(tokenizer, loses_space=name == "llama, metaspace"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text), text
    assert theirs("To be")["input_ids"] == tokenizer.prompt_ids("To be")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    from gptjax.tokenizer.known_templates import template_of

    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who is it?"},
            {"role": "assistant", "content": "It is I."}, {"role": "user", "content": "And who else?"}]  # fmt: skip
    for messages, add in ((said[:2], True), (said[:3], False), (said, True)):
        ours, _ = template_of(tokenizer).render(tokenizer, messages, add)
        got = theirs.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)
        assert got == ours, theirs.decode(got)


def open_tokenizer_with_chat(name):
    """The tokenizer with a template that it can hold."""
    tokenizer = KINDS[name]
    plain = "deepseek-v2" if "[INST]" in tokenizer.specials else "mistral-v1"
    set_template(tokenizer, "chatml" if {*CHATML} <= tokenizer.specials.keys() else plain)
    return tokenizer

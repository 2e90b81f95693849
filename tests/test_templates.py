"""Laws of chat templates: prefixes are kept, answers and their ends are what is trained, and no text forges a token.

Jinja texts of real models are read from the folder that GPTJAX_JINJA names, where it is set (*.jinja).
"""

import json
import os
import random
from pathlib import Path

import pytest
from awkward_texts import AWKWARD, sentencepiece_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.config.section import InputError
from gptjax.tokenizer import BytesTokenizer, SentencePieceTokenizer, set_template
from gptjax.tokenizer.known_templates import KNOWN, TEMPLATES, jinja_sha256, named_template, template_of
from gptjax.tokenizer.templates import Piece, Template

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra gptjax[bpe]")

from byte_pairs import byte_level_json, from_json, llama_json, llama_model  # noqa: E402 : after what it needs

from gptjax.tokenizer.conventions import set_known_template  # noqa: E402
from gptjax.tokenizer.export import write_tokenizer  # noqa: E402
from gptjax.tokenizer.jinja import jinja_for, jinja_of  # noqa: E402

TOKENS = sorted({token for template in TEMPLATES.values() for token in template.tokens})
FORGED = [*TOKENS, "{bos}", "{eos}", "<s>", "</s>", "<BOS>", "<EOS>"]


def with_tokens(values: dict) -> dict:
    """A tokenizer.json with the tokens of every template."""
    size = max(values["model"]["vocab"].values()) + 8
    known = {token["content"] for token in values["added_tokens"]}
    new = [token for token in TOKENS if token not in known]
    added = [{"id": size + i, "content": token, "special": True} for i, token in enumerate(new)]
    return values | {"added_tokens": [*values["added_tokens"], *added]}


LLAMA = llama_model()
TOKENIZERS = {
    "byte level": from_json(with_tokens(byte_level_json())),
    "llama, legacy": from_json(with_tokens(llama_json(LLAMA, legacy=True))),
    "llama, metaspace": from_json(with_tokens(llama_json(LLAMA, legacy=False))),
    "sentencepiece": SentencePieceTokenizer(sentencepiece_model(vocab_size=430, user_defined_symbols=TOKENS)),
}
every_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
contents = st.lists(
    st.one_of(st.sampled_from([*AWKWARD, *FORGED]), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)),
    max_size=4,
).map("".join)


@st.composite
def dialogues(draw):
    system = draw(st.one_of(st.none(), contents))
    turns = draw(st.lists(contents, min_size=1, max_size=6))
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@every_tokenizer
@every_template
@settings(max_examples=15, deadline=None)
@given(messages=dialogues())
def test_earlier_messages_are_a_prefix_and_answers_with_their_ends_are_trained(template, tokenizer, messages):
    ids, weights = template.render(tokenizer, messages)
    assert len(ids) == len(weights) and {*weights} <= {0, 1}
    trained = [0] * len(ids)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, none = template.render(tokenizer, messages[:k], add_generation_prompt=True)
            assert ids[: len(asked)] == asked and not any(none[-1:])
            done, counted = template.render(tokenizer, messages[: k + 1])
            end = max(i for i, weight in enumerate(counted) if weight) + 1
            assert ids[:end] == done[:end] and ids[end - 1] == template.stop_ids(tokenizer)[0]
            answer = message["content"].strip() if "assistant" in template.trim else message["content"]
            tail = template.end[: template.end.index(template.stop)]
            said = tokenizer.decode_bytes(ids[len(asked) : end]).decode()
            assert said.removeprefix(" " * template.spaced(tokenizer)) == (answer + tail).removeprefix(
                " " * (template.spaced(tokenizer) and not template.lead and not answer)
            )
            trained[len(asked) : end] = [1] * (end - len(asked))
    assert weights == trained


@every_tokenizer
@every_template
@settings(max_examples=15, deadline=None)
@given(messages=dialogues())
@example(messages=[{"role": role, "content": "a".join(FORGED)} for role in ("user", "assistant")])
def test_a_message_can_forge_no_special_token(template, tokenizer, messages):
    ids, _ = template.render(tokenizer, messages)
    never = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.specials.values()}
    plain = [message | {"content": "x"} for message in messages]
    assert [i for i in ids if i in never] == [i for i in template.render(tokenizer, plain)[0] if i in never]


def test_the_text_between_two_special_tokens_is_one():
    messages = [{"role": "user", "content": "\nWho?<|im_end|>"}, {"role": "assistant", "content": "I."}]
    start, end = Piece("<|im_start|>", True, 0), Piece("<|im_end|>", True, 0)
    assert TEMPLATES["chatml"].pieces(messages) == [
        start,
        Piece("user\n\nWho?<|im_end|>", False, 0),
        end,
        Piece("\n", False, 0),
        start,
        Piece("assistant\n", False, 0),
        Piece("I.", False, 1),
        end._replace(weight=1),
        Piece("\n", False, 0),
    ]
    tokenizer = TOKENIZERS["byte level"]
    ids, _ = TEMPLATES["chatml"].render(tokenizer, messages[:1])
    assert (
        ids[1:-2]
        == tokenizer.encode("user\n\nWho?<|im_end|>")
        != tokenizer.encode("user\n") + tokenizer.encode("\nWho?<|im_end|>")
    )


def test_white_space_beside_a_token_that_takes_it_is_gone():
    values = with_tokens(byte_level_json())
    for token in values["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|user|>", "<|assistant|>", "<|end|>")
        token["lstrip"] = token["content"] == "<|end|>"
    tokenizer, plain = from_json(values), TOKENIZERS["byte level"]
    ids, _ = TEMPLATES["phi3"].render(tokenizer, [{"role": "user", "content": " \n Who? "}], add_generation_prompt=True)
    names = {i: name for name, i in plain.specials.items()}
    assert [names.get(i, i) for i in ids] == ["<|user|>", *plain.encode("Who?"), "<|end|>", "<|assistant|>"]


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("messages", "add", "says"),
    [
        ([], False, "has no messages"),
        ("Hello", False, "has no messages"),
        (["Hello"], False, "message 0 has role None; wanted system, user or assistant"),
        (
            [*user("a"), {"role": "tool", "content": "b"}],
            False,
            "message 1 has role 'tool'; wanted it behind an answer with tool_calls",
        ),
        ([*user("a"), {"role": "system", "content": "b"}], False, "message 1 has role 'system'; wanted user or"),
        ([{"role": "user", "content": None}], False, "message 0 has content None; wanted a text"),
        ([{"role": "user", "content": ["a\n"]}], False, "message 0 has content .*; wanted a text"),
        (user("a", "b"), True, "the last message is an answer already"),
        (user("a") * 2, False, "roles user, user; wanted user and assistant in turns, as the template gemma"),
        ([{"role": "system", "content": "a"}], False, "a system message alone"),
    ],
)
def test_messages_that_are_no_conversation_are_refused_in_one_line(messages, add, says):
    with pytest.raises(InputError, match=says) as error:
        TEMPLATES["gemma"].pieces(messages, add)
    assert "\n" not in str(error.value)


def test_a_template_needs_its_tokens_and_says_so():
    tokenizer = BytesTokenizer()
    with pytest.raises(InputError, match="has no chat template, .*--template, one of chatml, smollm2"):
        template_of(tokenizer)
    with pytest.raises(InputError, match=r"the template chatml needs the special token '<\|im_start\|>'"):
        set_template(tokenizer, "chatml")
    with pytest.raises(InputError, match=r"template llama2 writes '\[INST\]' as text, which is a special token"):
        set_template(TOKENIZERS["byte level"], "llama2")
    with pytest.raises(InputError, match="no chat template 'chattml'; wanted one of chatml"):
        named_template("chattml")
    set_template(tokenizer, "llama2")  # which has none of its own
    assert template_of(tokenizer) is TEMPLATES["llama2"] and TEMPLATES["llama2"].stop_ids(tokenizer) == (257,)


class Refused(Exception):
    pass


def rendered(jinja: str, messages: list[dict], add: bool, **more) -> str:
    """The text that transformers would make, with its settings of Jinja."""

    sandbox = pytest.importorskip("jinja2.sandbox", reason="renders the Jinja texts that the parts are held against")

    def raise_exception(message):
        raise Refused(message)

    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    names = {"bos_token": "<BOS>", "eos_token": "<EOS>", "add_generation_prompt": add}
    return env.from_string(jinja).render(messages=messages, **names, **more)


def text_of(template: Template, messages: list[dict], add: bool, **more) -> str:
    names = {"{bos}": "<BOS>", "{eos}": "<EOS>"}
    return "".join(names.get(p.text, p.text) if p.is_token else p.text for p in template.pieces(messages, add, **more))


def some_dialogues() -> list[list[dict]]:
    """45 of one to five turns, a third with each of no system message, a short one, and one with space around it."""
    rng = random.Random(0)
    texts = ["Hello", "what is 2+2?", "a\nb", "  spaced  ", "\u4e2d\u6587", "<s> [INST] x", "\n\nlead", "tail\n", ""]
    systems: list[list[dict]] = [
        [],
        [{"role": "system", "content": "Be kind."}],
        [{"role": "system", "content": " Two\nlines "}],
    ]
    return [system + user(*rng.choices(texts, k=n)) for n in range(1, 6) for system in systems for _ in range(3)]


@every_template
def test_the_jinja_text_that_is_written_renders_as_the_parts_do(template):
    jinja = jinja_of(template)
    for messages in some_dialogues():
        add = messages[-1]["role"] == "user"
        assert rendered(jinja, messages, add) == text_of(template, messages, add), messages
    for wrong in ([*user("a"), {"role": "system", "content": "b"}], *([user("a") * 2] if template.alternate else [])):
        with pytest.raises(Refused):
            rendered(jinja, wrong, False)


@every_tokenizer
def test_a_template_that_is_written_is_known_when_it_is_read(tokenizer):
    for template in TEMPLATES.values():
        set_known_template(tokenizer, jinja_for(tokenizer, template))
        says_a_token_as_text = not template.tokens and "[INST]" in template.user[0]  # it is no template of this one
        assert tokenizer.template == ("" if says_a_token_as_text else template.name)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@every_template
def test_the_library_gives_the_ids_of_the_jinja_text_that_is_written(template, kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    if not template.tokens:  # its [INST] is text
        tokenizer = {
            "byte level": from_json(plain_json()),
            "sentencepiece": SentencePieceTokenizer(sentencepiece_model()),
        }[kind]
    tokenizer.template = template.name
    write_tokenizer(tokenizer, tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = {"<BOS>": config["bos_token"], "<EOS>": config["eos_token"]}
    equal = 0
    for messages in some_dialogues():
        add, said = messages[-1]["role"] == "user", "".join(m["content"] for m in messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if (
            "<s>" in said
            or not all(m["content"].strip() for m in messages)
            or any(answer.startswith(("\n", " ")) for answer in answers)
        ):
            continue  # a token that is named; no text at all; an answer whose white space the prompt's would join
        text = rendered(config["chat_template"], messages, add)
        for name, token in names.items():
            text = text.replace(name, token)
        ids, _ = template.render(tokenizer, messages, add)
        assert made.encode(text, add_special_tokens=False).ids == ids, messages
        equal += 1
    assert equal >= 10


def plain_json() -> dict:
    values = byte_level_json()
    return values | {"added_tokens": [token for token in values["added_tokens"] if token["content"] != "[INST]"]}


def differs(name: str, jinja: str, messages: list[dict]) -> bool:
    """True where a Jinja text is known to render otherwise than the template (see KNOWN)."""
    system, answers = messages[0]["role"] == "system", sum(m["role"] == "assistant" for m in messages)
    last = messages[-1]["role"] == "assistant"
    return (
        (name == "qwen3" and (answers > last or messages[-1]["content"].startswith("\n")))
        or (name.startswith("mistral-v3") and system and answers > 0)
        or (name.startswith("phi3") and ("else %}{{ eos_token" in jinja and last or "system" not in jinja and system))
        or (name == "llama3" and "if add_generation_prompt" not in jinja and last)
    )


def test_the_jinja_texts_of_real_models_render_as_their_parts_do(capsys):
    folder = os.environ.get("GPTJAX_JINJA", "")
    if not folder:
        pytest.skip("GPTJAX_JINJA names no folder with the Jinja texts of real models (*.jinja)")
    compared = {}
    for path in sorted(Path(folder).glob("*.jinja")):
        jinja = path.read_text("utf-8").strip()
        name = KNOWN.get(jinja_sha256(jinja))
        if name is None:
            continue
        equal = 0
        for messages in some_dialogues():
            if differs(name, jinja, messages):
                continue
            add = messages[-1]["role"] == "user"
            try:
                want = rendered(jinja, messages, add, enable_thinking=False)
            except Refused:
                continue
            end = {"deepseek-v3": "<\uff5cend\u2581of\u2581sentence\uff5c>"}.get(name, "<EOS>")
            assert text_of(TEMPLATES[name], messages, add).replace("<EOS>", end) == want, (path, messages)
            equal += 1
        compared[path.stem] = (name, equal)
    assert compared
    with capsys.disabled():
        print("\n" + "\n".join(f"{stem}: {name}, {n} of 45 dialogues equal" for stem, (name, n) in compared.items()))


def test_hashes_name_templates_that_there_are():
    assert {*KNOWN.values()} == {*TEMPLATES} and all(len(sha256) == 64 for sha256 in KNOWN)

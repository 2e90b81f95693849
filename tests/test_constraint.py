"""Laws of constrained decoding: what is drawn fits, no state is a dead end, and every answer ends within its budget."""

import json
import random
import time

import jax
import numpy as np
import pytest
from awkward_texts import sentencepiece_model
from commands import refused
from test_chat import run as run  # a fixture

from gptjax.cli import main
from gptjax.config import GenerateConfig
from gptjax.config.section import InputError
from gptjax.generation.constraint import Constraint, choices_constraint, json_constraint
from gptjax.generation.engine import stream_ids
from gptjax.runs.load import load_model
from gptjax.tokenizer import BytesTokenizer, SentencePieceTokenizer

jsonschema = pytest.importorskip("jsonschema", reason="checks what a constraint lets through")

pytestmark = pytest.mark.usefixtures("compile_cache")
TOKENIZERS = {"bytes": BytesTokenizer(), "sentencepiece": SentencePieceTokenizer(sentencepiece_model(vocab_size=430))}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

PERSON = {
    "type": "object",
    "title": "a person",
    "properties": {
        "name": {"type": "string", "maxLength": 12, "minLength": 2},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", 3, None, {"x": [1]}]}, "minItems": 1, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "number"}, {"$ref": "#"}]},
        "kind": {"const": "person"},
    },
    "required": ["name", "kind"],
}


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    kinds = ["string", "number", "integer", "boolean", "null", "enum", "const", "several", "anything"]
    kind = rng.choice([*kinds, *(["object", "array", "anyOf"] * 3 if depth else [])])
    if kind in ("number", "integer", "boolean", "null"):
        return {"type": kind}
    if kind == "anything":
        return rng.choice([{}, {"type": "object"}, {"type": "array", "maxItems": 2}])
    if kind == "several":
        return {"type": rng.sample(["string", "null", "integer", "boolean"], 2)}
    if kind == "string":
        least = rng.randrange(4)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(5)}
    if kind in ("enum", "const"):
        values = rng.sample(
            [1, "a", "ab", 'q"\\\n', None, True, 2.5, ["x"], {"k": "\u4e2d"}, "\ud800"], rng.randrange(1, 4)
        )
        return {"enum": values} if kind == "enum" else {"const": values[0]}
    if kind == "array":
        least = rng.randrange(3)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": least, "maxItems": least + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    names = rng.sample(["a", "ab", 'q"', "\u4e2d\u6587", "", "x y", "abc"], rng.randrange(5))
    schema = {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names},
              "required": [name for name in names if rng.random() < 0.5]}  # fmt: skip
    return schema | ({"additionalProperties": rng.choice([True, {"type": "integer"}])} if rng.random() < 0.3 else {})


def strict(schema):
    """The schema as jsonschema reads it: without additionalProperties there are none beside properties."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    given = {name: value if name in ("enum", "const") else strict(value) for name, value in schema.items()}
    return {"additionalProperties": False} | given if isinstance(schema.get("properties"), dict) else given


def draw(constraint: Constraint, tokenizer, rng: np.random.Generator, budget: int) -> bytes:
    """A text of ids that are allowed, each as likely; at every state one is, and an end only where it is complete."""
    state, ids = constraint.start(), []
    for left in range(budget, 0, -1):
        allowed_V = constraint.allowed(state, left)
        assert allowed_V.any(), "a dead end"
        assert allowed_V[tokenizer.eos_id] == constraint.finished(state)
        token = int(rng.choice(np.flatnonzero(allowed_V)))
        if token == tokenizer.eos_id:
            return tokenizer.decode_bytes(ids)
        ids.append(token)
        state = constraint.advance(state, token)
        assert state >= 0
    assert constraint.finished(state)
    return tokenizer.decode_bytes(ids)


@every_tokenizer
@pytest.mark.parametrize("count", [pytest.param(25, id="a few"), pytest.param(400, id="all", marks=pytest.mark.slow)])
def test_random_texts_of_random_schemas_fit_them_and_end_within_any_budget(tokenizer, count):
    rng, drawn = random.Random(count), 0
    for n in range(count):
        schema = random_schema(rng)
        constraint = json_constraint(tokenizer, schema, [tokenizer.eos_id])
        validator = jsonschema.Draft202012Validator(strict(schema))
        needed = constraint.needed(constraint.start())
        for extra in (0, 1, 7, 60):
            text = draw(constraint, tokenizer, np.random.default_rng(n + extra), needed + extra)
            value = json.loads(text.decode("utf-8"))
            validator.validate(value)
            drawn += 1
    assert drawn == 4 * count


@every_tokenizer
def test_allowed_ids_are_those_that_can_be_advanced_by(tokenizer):
    constraint = json_constraint(tokenizer, PERSON, [tokenizer.eos_id])
    rng, state = np.random.default_rng(0), constraint.start()
    for _ in range(40):
        allowed_V = constraint.allowed(state)
        one_by_one = [constraint.advance(state, i) >= 0 for i in range(tokenizer.vocab_size)]
        assert allowed_V.tolist() == one_by_one
        token = int(rng.choice(np.flatnonzero(allowed_V)))
        if token == tokenizer.eos_id:
            break
        state = constraint.advance(state, token)


@every_tokenizer
def test_text_that_a_schema_has_is_let_through_whatever_its_tokens(tokenizer):
    for text in (
        '{"name":"ab","kind":"person"}',
        '{"name": "\\u00e9\\n\u4e2d", "age": -3, "tags": ["a", {"x": [1]}], "more": 1.5e-7, "kind": "person"}',
        '{\n  "name": "abc",\n  "more": {"name": "de", "kind": "person"},\n  "kind": "person"\n}',
    ):
        jsonschema.validate(json.loads(text), strict(PERSON))
        constraint = json_constraint(tokenizer, PERSON, [tokenizer.eos_id], spaced=True)
        state = constraint.start()
        for token in tokenizer.encode(text):
            assert constraint.allowed(state)[token], tokenizer.decode_bytes([token])
            state = constraint.advance(state, token)
        assert constraint.finished(state)
    wrong = ['{"kind": "person", "name": "ab"}', '{"name": "a"', '{"name":  "ab"', '{"name": "ab", "age": 01',
             '{"name": "ab", "other"', '{"name": "abcdefghijklm', '{"name": "\\ud800', '{"name": "a\n']  # fmt: skip
    for text in wrong:
        constraint = json_constraint(BytesTokenizer(), PERSON, [257])
        state = constraint.start()
        for byte in text.encode():
            state = constraint.advance(state, byte) if state >= 0 else state
        assert state == -1, text


def test_other_properties_have_none_of_the_names_that_are_declared():
    names = ["a", "abc", 'q"', "\u4e2d"]
    schema = {"type": "object", "properties": {name: {"const": 1} for name in names}}
    tokenizer = TOKENIZERS["bytes"]
    constraint = json_constraint(tokenizer, schema | {"additionalProperties": {"type": "string"}}, [257])
    for name in ("a", "abc", "ab", "abcd", "", "b\u4e2d", "x"):
        fits = name not in names
        state = constraint.start()
        for byte in json.dumps({name: "x"}, ensure_ascii=False).encode():
            state = constraint.advance(state, byte) if state >= 0 else state
        assert (state >= 0 and constraint.finished(state)) is fits, name


def test_choices_are_written_whole_and_one_may_begin_another():
    tokenizer = TOKENIZERS["bytes"]
    constraint = choices_constraint(tokenizer, ["no", "nope", "\u4e2d"], [257])
    rng = np.random.default_rng(0)
    assert {draw(constraint, tokenizer, rng, 9).decode() for _ in range(40)} == {"no", "nope", "\u4e2d"}
    state = constraint.advance(constraint.advance(constraint.start(), ord("n")), ord("o"))
    assert np.flatnonzero(constraint.allowed(state)).tolist() == [ord("p"), 257]
    assert np.flatnonzero(constraint.allowed(state, 1)).tolist() == [257], "what can't be completed is not begun"
    spaced = choices_constraint(tokenizer, ["no"], [257], spaced=True)
    assert np.flatnonzero(spaced.allowed(spaced.start())).tolist() == [ord(" "), ord("n")]
    with pytest.raises(InputError, match="max_new_tokens=1: wanted at least 2"):
        constraint.check(1)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": "a+"}, "schema: the keyword 'pattern' is not supported"),
        ({"type": "integer", "minimum": 0}, "the keyword 'minimum'"),
        ({"type": "object", "properties": {"a": {"oneOf": []}}}, r"schema\.a: the keyword 'oneOf'"),
        ({"type": "array", "items": {"type": "text"}}, r"schema\.items: type is \['text'\]; wanted one of object"),
        ({"properties": {}}, "type is missing"),
        ({"type": "string", "items": {}}, "'items' says nothing of type string"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "'type' beside 'anyOf'"),
        ({"enum": []}, "no value fits enum"),
        ({"enum": ["a"], "type": "integer"}, "no value fits enum"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "nothing fits"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "required names 'a'"),
        ({"$ref": "#/$defs/a"}, "names nothing"),
        ({"$ref": "http://x/y"}, "wanted one into the schema itself"),
        ({"$ref": "#"}, "refers to itself"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}},
            "refers to itself",
        ),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no text that this tokenizer"),
        ([], "wanted a JSON schema"),
        ({"type": "string", "maxLength": -1}, "maxLength is -1"),
        ({"const": float("nan")}, "is no JSON"),
    ],
)
def test_a_schema_that_is_not_supported_is_refused_by_name_in_one_line(schema, says):
    with pytest.raises(InputError, match=says) as e:
        json_constraint(BytesTokenizer(), schema, [257])
    assert "\n" not in str(e.value)


CASES = [pytest.param(20, id="20 rows"), pytest.param(500, id="500 rows", marks=pytest.mark.slow)]


@pytest.mark.parametrize("rows", CASES)
def test_answers_of_a_model_that_was_never_trained_are_all_valid(rows, run):
    model = load_model(run, None)
    tokenizer = model.tokenizer
    constraint = json_constraint(tokenizer, PERSON, [257], size=model.decoder.vocab_size)
    cfg = GenerateConfig(max_new_tokens=96, temperature=1.0, seed=3)
    answers = [b""] * rows
    with jax.set_mesh(model.mesh):
        prompts = [[256, 97]] * rows
        for news in stream_ids(model.decoder, model.params, prompts, cfg, stop_ids=[257], constraint=constraint):
            answers = [said + tokenizer.decode_bytes(ids) for said, ids in zip(answers, news, strict=True)]
    validator = jsonschema.Draft202012Validator(strict(PERSON))
    for said in answers:
        validator.validate(json.loads(said))
    assert len(set(answers)) > rows * 0.9


def test_generate_writes_a_choice_or_json_that_fits(run, capsys, tmp_path):
    flags = ["--prompt", "a", "--max-new-tokens", "40", "--seed", "5"]
    assert main(["generate", str(run), *flags, "--choices", "yes", "no"]) == 0
    assert capsys.readouterr().out in {f"a{space}{word}\n" for space in ("", " ") for word in ("yes", "no")}
    (tmp_path / "schema.json").write_text(json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 2}))
    assert main(["generate", str(run), "--chat", *flags, "--json-schema", str(tmp_path / "schema.json")]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value) >= 2 and all(type(v) is bool for v in value)
    for more, says in (
        (["--json-schema", tmp_path / "none.json"], "can't be read as JSON"),
        (["--json-schema", tmp_path / "schema.json", "--choices", "a"], "none beside --choices"),
        (["--choices", "y" * 50], "max_new_tokens=40: wanted at least 50, which the shortest text takes"),
    ):
        assert says in refused(capsys, "generate", run, *flags, *more)


def test_a_large_vocabulary_takes_milliseconds():
    rng = random.Random(0)
    words = [bytes(rng.choices(range(32, 127), k=rng.randrange(2, 8))) for _ in range(49_000)]

    class Large(BytesTokenizer):
        """Bytes, and 49,000 words of two to seven of them."""

        _bytes = [*BytesTokenizer._bytes, *words]
        vocab_size = len(_bytes)

    tokenizer = Large()
    constraint = json_constraint(tokenizer, PERSON, [257])
    draw(constraint, tokenizer, np.random.default_rng(0), 60)
    state, seconds = constraint.start(), []
    for token in b'{"name": "abcdefg':
        begun = time.perf_counter()
        constraint.allowed(state, 50)
        seconds.append(time.perf_counter() - begun)
        state = constraint.advance(state, token)
    print("milliseconds a state:", *(f"{1e3 * s:.1f}" for s in seconds))
    assert sorted(seconds)[len(seconds) // 2] < 0.25, seconds


@pytest.mark.parametrize(
    "schema",
    [{"type": "string", "minLength": 10**9}, {"const": "x" * 100_000},
     {"type": "array", "minItems": 10_000, "items": {"type": "array", "minItems": 10_000}}],
    ids=str,
)  # fmt: skip
def test_a_form_of_endless_texts_is_refused_at_once(schema):
    begun = time.perf_counter()
    with pytest.raises(InputError, match="bytes"):
        json_constraint(BytesTokenizer(), schema, [257])
    assert time.perf_counter() - begun < 5


def test_a_branch_of_endless_texts_costs_no_more_than_what_is_left():
    schema = {"anyOf": [{"const": 1}, {"type": "string", "minLength": 10**9}]}
    constraint, begun = json_constraint(BytesTokenizer(), schema, [257]), time.perf_counter()
    constraint.check(100)
    allowed_V = constraint.allowed(constraint.start(), 100)
    assert [chr(i) for i in np.flatnonzero(allowed_V)] == ["1"] and time.perf_counter() - begun < 5

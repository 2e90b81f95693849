"""Laws of tools: what the calculator and the search refuse, how calls are read and written, what a text can't forge."""

import json
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
from commands import refused
from test_chat import GREEDY
from test_chat import run as run  # a fixture
from test_templates import FORGED, TOKENIZERS, Refused, every_template, rendered, text_of

from gptjax.config.command_line import load_recipe
from gptjax.config.section import InputError
from gptjax.data.dialogue import messages_of, tools_of
from gptjax.generation.text_stream import TextStream
from gptjax.runs.load import load_model
from gptjax.serve import session as sessions
from gptjax.serve.calculator import calculate
from gptjax.serve.search import Index, passages
from gptjax.serve.session import Session
from gptjax.serve.tools import Toolbox, calculator_tool, function_tool, open_tools
from gptjax.tokenizer.known_templates import KNOWN, TEMPLATES, jinja_sha256
from gptjax.tokenizer.tool_calls import HERMES, begins_call, parse_calls

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", "7"), ("-2**2", "-4"), ("2**-1", "0.5"), ("2**3**2", "512"), ("(1+2)*3", "9"), ("7//2", "3"),
        ("-7//2", "-4"), ("-7%3", "2"), ("0.1+0.2", "0.3"), (" 1.50 ", "1.5"), ("1/3", "0.333333333333333"),
        ("2/3*3", "2"), ("4**0.5", "2"), ("2**0.5", "1.4142135623731"), ("--1", "1"), ("1234*9876", "12186984"),
        ("10**20/3", "3.33333333333333E+19"), ("1/8*100", "12.5"), (".5*4", "2"), ("-1/1000", "-0.001"),
    ],
)  # fmt: skip
def test_the_calculator_computes_exactly(expression, value):
    assert calculate(expression) == value


def test_the_calculator_agrees_with_python_on_random_expressions():
    rng = random.Random(0)

    def grown(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randrange(1000))
        left, right = grown(depth - 1), grown(depth - 1)
        made = f"{left} {rng.choice(['+', '-', '*', '//', '%'])} {right}"
        return f"({made})" if rng.random() < 0.6 else f"-{made}"

    compared = 0
    for _ in range(2000):
        text = grown(4)
        try:
            assert calculate(text) == str(eval(text)), text
            compared += 1
        except InputError as e:
            assert "division by zero" in str(e)
    assert compared > 1000


REFUSED = [
    "9**9**9", "(9**9)**(9**9)", "2**-9**9**9", "1.5**9**9", "9**9**9**9**9", "x", "__import__('os').system('x')",
    "(1).real", "a.b", "().__class__", "1+" * 5000 + "1", "(" * 5000 + ")" * 5000, "9" * 10_000, "9" * 500,
    "(" * 100 + "1" + ")" * 100, "2**" * 100 + "2", "1e9", "1,000", "1/0", "1%0", "1//(2-2)", "0**-1", "(-8)**0.5", "",
    "1 2", "1..2", "1 +", ")", "lambda: 1", "[1]", "'a'*9", "\u0663", "1;2", "1=1", "10**99*10", "1" + "*9.9" * 249,
]  # fmt: skip


@pytest.mark.parametrize("expression", REFUSED, ids=range(len(REFUSED)))
def test_the_calculator_refuses_the_rest_in_one_line_within_a_millisecond(expression):
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        with pytest.raises(InputError) as e:
            calculate(expression)
        seconds.append(time.perf_counter() - begun)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200
    assert min(seconds) < 1e-3


def test_search_finds_passages_and_reads_nothing_outside_of_its_folder(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "whales.md").write_text(
        "First.\n\n" + "The sea is wide. " * 60 + "\n\nMoby Dick is a white whale.\n"
    )
    (folder / "paris.txt").write_text("Paris is the capital of France.\n")
    (folder / "\u4e2d.txt").write_text("\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd\u3002\n", encoding="utf-8")
    (folder / ".hidden.txt").write_text("capital capital capital")
    (folder / "picture.png").write_bytes(b"\xff capital")
    index = Index(folder)
    assert [p[:2] for p in index.search("the white WHALE")][0] == ("deep/whales.md", 5)
    assert index.search("capital of France", 1)[0].file == "paris.txt"
    assert index.search("\u4e2d\u56fd\u9996\u90fd")[0].file == "\u4e2d.txt"
    assert index.search("zebra") == [] and index.search("") == []
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for name, target in (("link.txt", secret), ("folder", tmp_path), ("up.txt", Path("../secret.txt"))):
        (folder / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name} is a link out of the folder"):
            Index(folder)
        (folder / name).unlink()
    (folder / "inside.txt").symlink_to(folder / "paris.txt")
    Index(folder)
    (folder / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"bad.txt can't be read as UTF-8"):
        Index(folder)
    with pytest.raises(InputError, match="is no folder"):
        Index(secret)
    with pytest.raises(InputError, match="has no text"):
        (tmp_path / "empty").mkdir()
        Index(tmp_path / "empty")


def test_passages_hold_all_lines_of_a_text_at_their_numbers():
    rng = random.Random(0)
    text = "\n".join(f"w{n} " + "x" * rng.randrange(300) if rng.random() < 0.8 else "" for n in range(300)) + "y" * 5000
    parts, lines = passages(text), text.splitlines()
    assert re.sub(r"\s", "", "".join(part for _, part in parts)) == re.sub(r"\s", "", text)
    assert all(part.splitlines()[0] in lines[line - 1] for line, part in parts)
    assert max(len(part) for _, part in parts) <= 1601


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C", tags: list[str] | None = None) -> dict:
    """Forecast of a city."""
    if city == "nowhere":
        raise KeyError(city)
    return {"city": city, "days": days, "unit": unit, "tags": tags}


def test_a_function_is_a_tool_by_its_signature_and_its_arguments_are_checked():
    tool = function_tool(weather)
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    }
    box = Toolbox([tool])
    assert box.specs[0]["function"]["description"] == "Forecast of a city."
    assert json.loads(box.call("weather", '{"city": "Rome", "days": 2}')) == {
        "city": "Rome", "days": 2, "unit": "C", "tags": None
    }  # fmt: skip
    for arguments, says in (
        ("{}", "argument 'city' is missing"),
        ('{"town": "Rome"}', "argument 'town' is unknown"),
        ('{"city": 1}', "argument city=1: wanted string"),
        ('{"city": "a", "days": true}', "argument days=True: wanted integer"),
        ('{"city": "a", "unit": "K"}', "wanted one of"),
        ("[1]", "wanted a JSON object"),
        ("{", "wanted a JSON object"),
        ("[" * 100_000, "wanted a JSON object"),
        ('{"city": "nowhere"}', "KeyError: 'nowhere'"),
    ):
        answer = box.call("weather", arguments)
        assert answer.startswith("error: ") and says in answer and "\n" not in answer
    assert "there is no tool 'eval'; wanted one of weather" in box.call("eval", "{}")


def test_wrong_tools_are_one_line(capsys, tmp_path, run):
    for name, says in (
        ("calculater", "tools='calculater': wanted calculator, search:FOLDER or module:function"),
        ("nowhere:f", "wanted module:name of a function"),
        (f"search:{tmp_path / 'none'}", "is no folder"),
        ("calculator,calculator", "wanted different names"),
    ):
        with pytest.raises(InputError, match=re.escape(says)) as e:
            open_tools(name)
        assert "\n" not in str(e.value)
    assert "wanted calculator, search:FOLDER" in refused(capsys, "chat", run, "--tools", "shell")
    assert (
        open_tools("calculator").call("calculator", '{"expression": "9**9**9"}').startswith("error: a result has more")
    )


def call(name: str, arguments: dict) -> dict:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": "call_1", "type": "function", "function": function}


def test_calls_are_read_from_text_as_models_write_it():
    one = '<tool_call>\n{"name": "a", "arguments": {"x": "<b>\\u00e9"}}\n</tool_call>'
    text, calls = parse_calls(f"Let me see.\n{one}\n{one}")
    assert text == "Let me see." and [c.name for c in calls] == ["a", "a"] and calls[0].id != calls[1].id
    assert json.loads(calls[0].arguments) == {"x": "<b>\u00e9"}
    assert parse_calls(one.removesuffix("</tool_call>"))[1], "the model ended behind the object"
    assert (
        parse_calls('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>')[1][0].arguments == '{"x": 1}'
    )
    assert parse_calls('<tool_call>{"name": "a"}</tool_call>')[1][0].arguments == "{}"
    for llama in (
        '{"name": "a", "parameters": {"x": 1}}',
        ' <|python_tag|>{"name": "a", "parameters": {"x": 1}}'.strip(),
    ):
        assert parse_calls(llama)[0] == "" and parse_calls(llama)[1][0].arguments == '{"x": 1}'
    for none in ("", "Hello", '{"name": "a"}', '{"a": 1}', "[1]", "<tool_call>", "<tool_call>x</tool_call>", '{"name":',
                 '<tool_call>{"name": 1, "arguments": {}}</tool_call>', '<tool_call>["a"]</tool_call>',
                 '<tool_call>{"name": "a", "arguments": [1]}</tool_call>', "<tool_call>" + "[" * 100_000,
                 '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>',
                 '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'):  # fmt: skip
        assert parse_calls(none) == (none, [])
    bad = f"<tool_call>x</tool_call> {one}"
    assert parse_calls(bad)[0] == "<tool_call>x</tool_call>" and len(parse_calls(bad)[1]) == 1


def test_no_part_of_a_call_is_shown_and_all_else_is_soon():
    text = 'I add.\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
    for end in range(len(text) + 1):
        assert begins_call(text[:end]) <= text.index("<tool_call>")
    assert begins_call("a < b") == len("a < b") and begins_call("a <tool") == 2
    assert begins_call('{"name"') == begins_call("<|pyth") == 0


CALLED = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "what is 2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [call("calculator", {"expression": "2+2"})]},
    {"role": "tool", "tool_call_id": "call_1", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
TOOLS = Toolbox([calculator_tool(), function_tool(weather)]).specs


def test_the_jinja_texts_of_real_models_write_tools_and_calls_as_their_parts_do(capsys):
    folder = os.environ.get("GPTJAX_JINJA", "")
    if not folder:
        pytest.skip("GPTJAX_JINJA names no folder with the Jinja texts of real models (*.jinja)")
    said = {**CALLED[2], "content": "I compute."}
    two = {**CALLED[2], "tool_calls": [*CALLED[2]["tool_calls"], call("weather", {"city": "\u5317"})]}
    results = [CALLED[3], {"role": "tool", "tool_call_id": "call_1", "content": '{"a": "b"}\n'}]
    dialogues = [
        (CALLED[:2], True), (CALLED[1:2], True), (CALLED[:4], True), (CALLED, False), (CALLED[1:], False),
        ([*CALLED[:2], two, *results], True), ([*CALLED[:2], said, CALLED[3]], True),
        ([*CALLED, *CALLED[1:]], False),
    ]  # fmt: skip
    compared = {}
    for path in sorted(Path(folder).glob("*.jinja")):
        jinja = path.read_text("utf-8").strip()
        name = KNOWN.get(jinja_sha256(jinja))
        if name not in ("qwen2.5", "qwen3", "llama3.1", "chatml") or "tool" not in jinja:
            continue
        template = TEMPLATES[name]
        for n, (messages, add) in enumerate(dialogues):
            if name == "qwen3" and not add:
                continue  # answers stand without the empty thought there
            if name == "llama3.1" and n in (5, 6):
                continue  # one call, and no text beside it
            if name == "qwen3" and n > 1:  # nor has an answer with calls one, but where the result is the last
                continue
            try:
                given = [as_objects(message) for message in messages]
                want = rendered(jinja, given, add, tools=TOOLS, enable_thinking=False, date_string="26 Jul 2024")
            except Refused:
                continue
            assert text_of(template, messages, add, tools=TOOLS) == want, (path, n)
            compared[f"{path.stem}: {name}"] = compared.get(f"{path.stem}: {name}", 0) + 1
    with capsys.disabled():
        print("\n" + "\n".join(f"{stem}: {n} conversations with tools equal" for stem, n in compared.items()))
    assert {key.split(": ")[1] for key in compared} == {"qwen2.5", "qwen3", "llama3.1", "chatml"}


def as_objects(message: dict) -> dict:
    """A message whose arguments are objects, as transformers wants them."""
    if "tool_calls" not in message:
        return message
    calls = [{**c, "function": c["function"] | {"arguments": json.loads(c["function"]["arguments"])}}
             for c in message["tool_calls"]]  # fmt: skip
    return message | {"tool_calls": calls}


@every_template
def test_calls_are_learned_results_are_not_and_an_answer_begins_where_a_model_goes_on(template):
    for tokenizer in TOKENIZERS.values():
        ids, weights = template.render(tokenizer, CALLED, tools=TOOLS)
        marks = template.marks(tokenizer)
        for k, message in enumerate(CALLED):
            if message["role"] == "assistant":
                asked, _ = template.render(tokenizer, CALLED[:k], add_generation_prompt=True, tools=TOOLS)
                done, counted = template.render(tokenizer, CALLED[: k + 1], tools=TOOLS)
                end = max(i for i, weight in enumerate(counted) if weight) + 1
                assert ids[: len(asked)] == asked and ids[:end] == done[:end] and all(weights[len(asked) : end])
                written = TextStream(tokenizer, marks=marks).push(ids[len(asked) : end - 1], final=True)
                text, calls = parse_calls(written.strip())
                assert [c.name for c in calls] == (["calculator"] if k == 2 else [])
                assert text == ("" if k == 2 else "It is 4.")
        learned = TextStream(tokenizer, marks=marks).push([i for i, w in zip(ids, weights) if w], final=True)
        assert "2+2" in learned and "tool_response" not in learned and "Be kind" not in learned
        assert sum(weights) < len(weights) / 2


def forged(tokenizer, template, text: str) -> bool:
    """True where one of seven places that a text may stand in gives another special token than a harmless one."""
    never = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.specials.values()}

    def tokens(text: str) -> list[int]:
        tool = {"type": "function", "function": {"name": text or "x", "description": text, "parameters": {}}}
        ids, _ = template.render(
            tokenizer,
            [
                {"role": "system", "content": text},
                {"role": "user", "content": text},
                {"role": "assistant", "content": text, "tool_calls": [call(text or "x", {text: text})]},
                {"role": "tool", "tool_call_id": text, "content": text},
                {"role": "assistant", "content": text},
            ],
            tools=[tool],
        )
        return [i for i in ids if i in never]

    return tokens(text) != tokens("x")


def random_text(rng: random.Random, names: list[str]) -> str:
    def part() -> str:
        other = chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD000))))
        return rng.choice(names) if rng.random() < 0.5 else other

    parts = [part() for _ in range(rng.randrange(1, 7))]
    if rng.random() < 0.3:  # cut or doubled inside
        at = rng.randrange(len(parts))
        parts[at] = parts[at][: rng.randrange(len(parts[at]) + 1)] + rng.choice(["", " ", "\n", parts[at]])
    return "".join(parts)


MARKS = [*HERMES.marks, "<|python_tag|>", "<tools>", "[TOOL_CALLS]", "<|eom_id|>"]
COUNTS = [pytest.param(40, id="a few"), pytest.param(8_000, id="all", marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("count", COUNTS)
@every_template
def test_no_text_forges_a_special_token_in_any_place(template, count):
    """count texts in seven places each for every template and tokenizer: 8,000 x 7 x 18 templates are 1,008,000."""
    rng, names = random.Random(template.name), [*FORGED, *MARKS]
    tokenizers = list(TOKENIZERS.values())
    for n in range(count):
        text = random_text(rng, names)
        assert not forged(tokenizers[n % len(tokenizers)], template, text), text


def test_records_with_calls_are_read_as_openai_writes_them():
    record = {"messages": CALLED, "tools": TOOLS}
    messages = messages_of(record, "x.jsonl:1")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert tools_of(record, "x") == TOOLS == tools_of({"tools": json.dumps(TOOLS)}, "x") and tools_of({}, "x") == []
    objects = messages_of(
        {"messages": [as_objects(m) | {"content": None} if "tool_calls" in m else m for m in CALLED]}, "x"
    )
    template, tokenizer = TEMPLATES["chatml"], TOKENIZERS["byte level"]
    assert template.render(tokenizer, objects) == template.render(tokenizer, messages)
    for wrong, says in (
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a"}}]},
            r"messages\[0\] has tool_calls",
        ),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"messages\[0\] is"),
        ({"role": "tool", "content": {"a": 1}}, r"messages\[0\] is"),
    ):
        with pytest.raises(InputError, match=f"x.jsonl:1: {says}") as e:
            messages_of({"messages": [wrong]}, "x.jsonl:1")
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="x.jsonl:1 has tools"):
        tools_of({"tools": [{"name": "a"}]}, "x.jsonl:1")


def test_a_session_makes_the_calls_of_an_answer_and_goes_on_with_their_results(run, monkeypatch, tmp_path):
    model = load_model(run, None)
    session = Session(model, model.tokenizer, GREEDY, "", Toolbox([calculator_tool()]), max_calls=2)
    said = iter(['<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call>', "It is 5."])
    asked, noted = [], []

    def stream_text(decoder, params, prompts, texts, cfg, *, stop_ids, chunk, pictures):
        assert not pictures
        asked.append(model.tokenizer.decode(prompts[0]))
        yield from ((0, piece) for piece in re.findall(r"(?s).{1,3}", next(said)))

    monkeypatch.setattr(sessions, "stream_text", stream_text)
    prepare = lambda s: sessions.Prepared(s._render(add_generation_prompt=True).ids, 0, 8, {})  # noqa: E731
    monkeypatch.setattr(Session, "prepare", prepare)
    session.noted = lambda call, result: noted.append((call.name, result))
    assert "".join(session.ask("2+3?")) == "It is 5." and noted == [("calculator", "5")]
    assert [m["role"] for m in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[1]["content"] == "" and session.messages[2]["content"] == "5"
    assert '"name": "calculator"' in asked[0] and "<tool_response>\n5\n</tool_response>" in asked[1]
    session.save(tmp_path / "chat.jsonl")
    record = json.loads((tmp_path / "chat.jsonl").read_text())
    assert messages_of(record, "x") == session.messages and tools_of(record, "x") == session.toolbox.specs
    session.undo()
    assert session.messages == []
    endless = '<tool_call>{"name": "calculator", "arguments": {"expression": "1"}}</tool_call>' * 2
    said = iter([endless] * 9)
    "".join(session.ask("again"))
    results = [m["content"] for m in session.messages if m["role"] == "tool"]
    assert results[:2] == ["1", "1"] and all(r.startswith("error: an answer makes at most 2") for r in results[2:])
    assert len(results) == 4 and session.messages[-1]["role"] == "assistant"


def test_fractions_are_exact_however_they_are_written():
    rng = random.Random(1)
    for _ in range(300):
        a, b = rng.randrange(1, 10**6), 10 ** rng.randrange(1, 7)
        assert Fraction(calculate(f"{a}/{b}")) == Fraction(a, b)


def test_the_recipe_writes_its_texts_as_the_template_does_and_its_answers_are_right(tmp_path, monkeypatch):
    recipe = load_recipe("calculator").module
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    template, rng, told = TEMPLATES["llama2"], random.Random(0), 0

    def written(messages: list[dict], tools=()) -> list[str]:
        pieces = template.pieces(messages, tools=tools)
        return [part for part in re.split(r"\{bos\}|\{eos\}", "".join(p.text for p in pieces)) if part]

    def ones(text: str) -> str:
        return re.sub(r"\d+", "1", text)

    texts = {ones(recipe.text(rng)["text"]) for _ in range(600)}
    for _ in range(400):
        record = recipe.conversation(rng)
        messages, tools = messages_of(record, "x"), tools_of(record, "x")
        said = re.fullmatch(r"It is (\d+)\.", messages[-1]["content"])
        if tools:
            arguments = messages[1]["tool_calls"][0]["function"]["arguments"]
            assert messages[2]["content"] == calculate(json.loads(arguments)["expression"])
            assert said and said[1] == messages[2]["content"]
            asked, answered = written(messages)
            assert ones(asked + answered) in texts and 5 * ones(answered) in texts
            told += ones("".join(written(messages, tools))) in texts
    assert told > 100, "whole prompts, with the description of the tool"
    assert recipe.pretrain().data.source == str(tmp_path / "texts.jsonl")

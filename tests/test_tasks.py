"""Laws of tasks: numbers are those of the full forward pass, examples give no item away, bad files are named."""

import gzip
import json
import math
import re

import jax
import numpy as np
import pytest
from commands import refused, said
from test_generate import LLAMA, TOKENIZER, forward, model

from gptjax.config import DataConfig, GenerateConfig, MeshConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import InputError, leaves
from gptjax.evals.measure import measure
from gptjax.evals.metrics import Metric, choice_metrics, exponential, mean, normalised, ratio
from gptjax.evals.report import centred_mean, results_json, table
from gptjax.evals.requests import encode_answers
from gptjax.evals.score import Scorer
from gptjax.evals.tasks import load_task
from gptjax.generation.engine import generate_ids
from gptjax.parallel.sharding import make_mesh
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Provenance, Run
from gptjax.tokenizer import BytesTokenizer

CONTEXT = 96
CHOICES = [
    {"query": "Two?", "choices": ["one", "two", "five"], "gold": 1},
    {"query": "Red or a fruit?", "choices": ["orange", "blue"], "gold": [0]},
    {"query": "Even?", "choices": ["2", "3", "4", "fifty"], "gold": [0, 2, 3]},
    {"query": "Sky?", "choices": ["blue", "a kind of cheese"], "gold": "blue"},
]
CLOZE = [{"context": "to be or not to", "continuation": "be"}, {"context": "knock", "continuation": "knock"}]
GENERATION = [{"prompt": f"{n}+1=", "answers": [str(n + 1), "x"]} for n in range(5)]
TEXTS = [{"text": "It was the best of times, it was the worst of times. " * 3}, {"text": "caf\u00e9"}]


@pytest.fixture(scope="module")
def tiny():
    decoder, params = model(LLAMA)
    decoder = decoder.clone(context=CONTEXT)
    return decoder, params, Scorer(decoder, params, make_mesh(MeshConfig(), jax.devices()[:1]), batch_tokens=512)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> str:
    """A run of that model, as an import makes one."""
    decoder, params, _ = tiny
    folder = tmp_path_factory.mktemp("tasks") / "run"
    tokenizer = TokenizerConfig(kind="bytes", vocab_size=TOKENIZER.vocab_size)
    data = DataConfig(length=CONTEXT)
    config = TrainConfig(run_dir=str(folder), model=decoder.cfg, tokenizer=tokenizer, data=data)
    made = Run.open(folder, config, Provenance())
    TOKENIZER.save(made.tokenizer)
    checkpoints = Checkpoints(made.checkpoints, config.checkpoint)
    checkpoints.save(0, {"params": params}, {"rows": 0}, dict(leaves(config)))
    checkpoints.wait()
    made.close()
    return str(folder)


def write(path, items, **head) -> str:
    lines = [{"task": head}, *items] if head else items
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def full(tiny, ids: list[int]) -> np.ndarray:
    """log p of every id behind each of these, from one full forward pass of all of them."""
    row_BL = np.zeros((1, CONTEXT), np.int32)
    row_BL[0, : len(ids)] = ids
    logits_LV = np.asarray(forward(tiny[0], tiny[1], row_BL), np.float64)[0]
    return logits_LV - np.logaddexp.reduce(logits_LV, axis=-1, keepdims=True)


def log_p(tiny, context: str, continuation: str) -> np.ndarray:
    """log p of each byte of a continuation."""
    front, ids = TOKENIZER.prompt_ids(context), TOKENIZER.encode(continuation)
    return full(tiny, [*front, *ids])[np.arange(len(ids)) + len(front) - 1, ids]


def test_choices_are_scored_as_the_full_forward_pass_does(tiny, tmp_path):
    task = load_task(write(tmp_path / "quiz.jsonl.gz", CHOICES, shots=1, delimiter="\n"))
    result = measure(task, tiny[2], TOKENIZER, seed=3)
    right = {"acc": 0, "acc_norm": 0, "acc_token": 0}
    for item, fields, record in zip(task.items, CHOICES, result.records, strict=True):
        prompt = task.prompt(item, 3)
        (example,) = task.shots(item, 3)
        assert prompt == f"{example.prompt} {example.answers[example.gold[0]]}\n{fields['query']}"
        want = [log_p(tiny, prompt, f" {choice}") for choice in fields["choices"]]
        np.testing.assert_allclose(record["scores"], [w.sum() for w in want], atol=1e-4)
        sums = np.array([w.sum() for w in want])
        best = {
            "acc": sums.argmax(),
            "acc_norm": (sums / [len(choice) for choice in fields["choices"]]).argmax(),
            "acc_token": (sums / [len(w) for w in want]).argmax(),
        }
        for name, choice in best.items():
            right[name] += choice in item.gold
    assert {name: result.metrics[name].value for name in right} == {name: n / 4 for name, n in right.items()}
    assert next(iter(result.metrics)) == "acc_norm"
    assert result.metrics["acc"].chance == pytest.approx((1 / 3 + 1 / 2 + 3 / 4 + 1 / 2) / 4)
    assert [item.gold for item in task.items] == [(1,), (0,), (0, 2, 3), (0,)]


def test_a_cloze_is_scored_as_the_full_forward_pass_does(tiny, tmp_path):
    likeliest = ((c, int(full(tiny, [TOKENIZER.bos_id, ord(c)])[1].argmax())) for c in "abcdefghijklmnop")
    context, best = next((c, best) for c, best in likeliest if best < 128)
    items = [*CLOZE, {"context": context, "continuation": chr(best)}]
    result = measure(load_task(write(tmp_path / "c.jsonl", items, kind="cloze", separator="")), tiny[2], TOKENIZER)
    want = [log_p(tiny, item["context"], item["continuation"]).sum() for item in items]
    np.testing.assert_allclose([r["score"] for r in result.records], want, atol=1e-4)
    assert [r["greedy"] for r in result.records] == [False, False, True]
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(-np.mean(want)), rel=1e-4)
    assert result.metrics["acc"].value == pytest.approx(1 / 3)


def test_texts_are_scored_whole_and_by_their_bytes(tiny, tmp_path):
    result = measure(load_task(write(tmp_path / "t.jsonl", TEXTS)), tiny[2], TOKENIZER)
    (long, short), (first, second) = result.records, TEXTS
    np.testing.assert_allclose(short["score"], log_p(tiny, "", second["text"]).sum(), atol=1e-4)
    # The long one in windows: the bytes that the first one predicts, and those behind it, which read what fits.
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(first["text"])]
    windows = [([ids[0]], ids[1 : CONTEXT + 1]), (ids[-CONTEXT - 1 : CONTEXT + 1], ids[CONTEXT + 1 :])]
    apart = Scorer(tiny[0], tiny[1], tiny[2].mesh, share=False).loglikelihoods(windows)
    assert long["score"] == pytest.approx(sum(one.total for one in apart), abs=1e-4)
    assert (short["tokens"], short["bytes"], long["words"]) == (5, 5, 37)
    nats = -(long["score"] + short["score"])
    assert result.metrics["bits_per_byte"].value == pytest.approx(nats / math.log(2) / (159 + 5))
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(nats / (159 + 5)))
    (tmp_path / "whole.txt").write_text(second["text"])
    (alone,) = measure(load_task(str(tmp_path / "whole.txt")), tiny[2], TOKENIZER).records
    assert alone["score"] == pytest.approx(short["score"], abs=1e-5)


def test_generated_texts_are_those_of_the_engine_up_to_a_stop(tiny, tmp_path):
    decoder, params, scorer = tiny
    items = [*GENERATION, {"prompt": "long " * 30, "answers": ["x"]}]
    task = load_task(write(tmp_path / "g.jsonl", items, kind="generation", shots=1, max_new_tokens=6, stop=["\n"]))
    result = measure(task, scorer, TOKENIZER, seed=1)
    assert result.truncated >= 1
    for item, record in zip(task.items, result.records, strict=True):
        ids = TOKENIZER.prompt_ids(task.prompt(item, 1))[-(CONTEXT - 6) :]
        greedy = GenerateConfig(max_new_tokens=6, temperature=0.0)
        (new,) = generate_ids(decoder, params, [ids], greedy, stop_ids=[TOKENIZER.eos_id])
        assert record["text"] == TOKENIZER.decode(new).partition("\n")[0]
        assert record["match"] == (record["text"].strip() in item.answers)


class ChatTokenizer(BytesTokenizer):
    specials = {"<|im_start|>": 256, "<|im_end|>": 257}
    template = "chatml"


def test_a_chat_scores_the_answer_to_a_message(tiny, tmp_path):
    tokenizer, asked = ChatTokenizer(), "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

    def ids(text: str) -> list[int]:
        parts = re.split(r"(<\|\w+\|>)", text)
        return [i for part in parts for i in ([tokenizer.specials[part]] if part.startswith("<|") else part.encode())]

    assert encode_answers(tokenizer, [("Two?", "one")]) == [(ids(asked.format("Two?")), ids("one"))]
    result = measure(load_task(write(tmp_path / "quiz.jsonl", CHOICES)), tiny[2], tokenizer, limit=2, chat=True)
    for fields, record in zip(CHOICES, result.records):
        front = ids(asked.format(fields["query"]))
        for choice, score in zip(fields["choices"], record["scores"], strict=True):
            log_p = full(tiny, [*front, *choice.encode()])[np.arange(len(choice)) + len(front) - 1, [*choice.encode()]]
            assert score == pytest.approx(log_p.sum(), abs=1e-4)
        assert record["continuations"] == fields["choices"]
    task = load_task(write(tmp_path / "g.jsonl", GENERATION, max_new_tokens=4, stop=["\0"]))
    greedy = GenerateConfig(max_new_tokens=4, temperature=0.0)
    (record,) = measure(task, tiny[2], tokenizer, limit=1, chat=True).records
    (new,) = generate_ids(tiny[0], tiny[1], [ids(asked.format("0+1="))], greedy, stop_ids=[257])
    assert record["text"] == tokenizer.decode(new).partition("\0")[0]
    with pytest.raises(InputError, match="quiz.jsonl: .*template"):
        measure(load_task(str(tmp_path / "quiz.jsonl")), tiny[2], TOKENIZER, limit=1, chat=True)


def test_examples_are_drawn_from_the_others_by_seed_and_item(tmp_path):
    items = [{"query": f"q{n % 12}", "choices": ["a", "b"], "gold": n % 2} for n in range(20)]  # some twice
    task = load_task(write(tmp_path / "a.jsonl", items) + ":shots=4")
    drawn = {seed: [task.shots(item, seed) for item in task.items] for seed in (0, 1)}
    assert drawn[0] == [task.shots(item, 0) for item in task.items] and drawn[0] != drawn[1]
    for examples in drawn.values():
        for item, shots in zip(task.items, examples, strict=True):
            assert len(shots) == len({e.number for e in shots}) == 4
            assert item.prompt not in [e.prompt for e in shots]
    assert len({tuple(e.number for e in shots) for shots in drawn[0]}) > 10
    write(tmp_path / "dev.jsonl", items[:6])
    first = load_task(f"{tmp_path}/a.jsonl:shots=2:shots_file=dev.jsonl:shots_order=first")
    assert [e.prompt for e in first.shots(first.items[9], 5)] == ["q0", "q1"]
    assert [e.prompt for e in first.shots(first.items[0], 5)] == ["q1", "q2"]
    drawn_there = load_task(f"{tmp_path}/a.jsonl:shots=2:shots_file=dev.jsonl")
    assert {e.prompt for item in drawn_there.items for e in drawn_there.shots(item, 0)} <= {f"q{n}" for n in range(6)}
    with pytest.raises(InputError, match="shots=19: wanted at most 18"):
        too_many = load_task(write(tmp_path / "a.jsonl", items) + ":shots=19")
        too_many.shots(too_many.items[0], 0)


def test_a_head_makes_texts_of_a_file_of_other_fields(tmp_path):
    fields = [
        {"task": "math", "input": " 1+1 ", "choices": ["2", "3"], "answer": "A"},
        {"task": "art", "input": "who", "choices": ["me", "you"], "answer": "B"},
        {"task": "art", "input": "{when}", "choices": ["now", "then"], "answer": "now"},
    ]
    write(tmp_path / "others.jsonl.gz", fields)
    head = {
        "kind": "multiple_choice", "items": "others.jsonl.gz", "where": ["task=art"], "gold": "answer",
        "prompt": "Q: {input}\nA. {choices[0]}\nB. {choices[1]}\nAnswer:", "labels": ["A", "B", "C"], "name": "named",
        "description": "Quiz. ",
    }  # fmt: skip
    (tmp_path / "head.json").write_text(json.dumps(head))
    task = load_task(str(tmp_path / "head.json"))
    assert task.name == "named" and [item.number for item in task.items] == [1, 2]
    assert task.prompt(task.items[0], 0) == "Quiz. Q: who\nA. me\nB. you\nAnswer:"
    assert [(item.answers, item.gold) for item in task.items] == [(("A", "B"), (1,)), (("A", "B"), (0,))]
    assert task.items[1].prompt.startswith("Q: {when}")
    assert load_task(f"{tmp_path}/head.json:where=task=math:name=x").items[0].number == 0


@pytest.mark.parametrize("name", ["capitals", "french", "proverbs", "sums"])
def test_a_shipped_task_is_sound(name):
    task = load_task(name)
    assert len(task.items) >= 30 and len({item.prompt for item in task.items}) == len(task.items)
    if name == "sums":
        assert all(int(i.answer) == sum(map(int, re.findall(r"\d+", i.prompt))) for i in task.items)


def test_standard_errors_are_those_of_the_textbook():
    assert mean([1, 0, 0, 1, 1], 0.25) == Metric(0.6, pytest.approx(math.sqrt(0.6 * 0.4 / 4)), 0.25)
    assert mean([1, 0, 0, 1, 1], 0.25).centred == pytest.approx(0.35 / 0.75)
    assert math.isnan(mean([1.0]).stderr) and mean([1.0]).centred is None
    tops, bottoms = np.array([3.0, 5.0, 1.0]), np.array([2.0, 2.0, 1.0])
    found = ratio(tops, bottoms)
    assert found.value == 9 / 5
    assert found.stderr == pytest.approx((tops - 1.8 * bottoms).std(ddof=1) / math.sqrt(3) / (5 / 3))
    assert exponential(Metric(2.0, 0.1)) == Metric(math.exp(2), pytest.approx(math.exp(2) * 0.1))
    records = [
        {"scores": [0] * n, "gold": [0], "choice": c, "choice_sum": 1, "choice_token": 0} for n, c in ((2, 0), (4, 1))
    ]
    found = choice_metrics(records, "acc")
    assert [*found] == ["acc", "acc_norm", "acc_token"]
    assert [m.value for m in found.values()] == [0, 0.5, 1] and found["acc"].chance == 0.375
    assert found["acc"].centred == pytest.approx(-0.6)


def test_answers_are_compared_by_what_is_kept_of_them():
    assert normalised(" The Eiffel-tower!\n", "strip") == "The Eiffel-tower!"
    assert normalised("The  Eiffel tower, a Tower!", "squad") == "eiffel tower tower"
    said = {"so 1,250 - 50 is 1,200.": "1200", "-3.5.": "-3.5", "none": "", "x2 = -7, not 8 m": "8"}
    assert {text: normalised(text, "last_number") for text in said} == said


def test_the_command_prints_a_table_and_writes_numbers_and_items(run, tmp_path, capsys):
    quiz, texts = write(tmp_path / "quiz.jsonl", CHOICES), write(tmp_path / "texts.jsonl", TEXTS)
    cloze = write(tmp_path / "cloze.jsonl", CLOZE, kind="cloze", name="knock")
    command = ["eval", run, "--tasks", quiz + ":shots=2", cloze, texts, quiz, "--limit", 3, "--mesh.fsdp", 2]
    out = said(capsys, *command, "--json", tmp_path / "a.json", "--items", tmp_path / "items.jsonl")
    lines = out.splitlines()
    assert lines[0].split() == ["task", "shots", "items", "metric", "value", "stderr", "chance", "centred"]
    assert [line.split()[:6] for line in lines if line.startswith("quiz")] == [
        ["quiz", shots, "3", "of", "4", "acc_norm"] for shots in "20"
    ]
    assert re.search(r"^centred accuracy -?\d\.\d{4}, the mean over 3 tasks$", out, re.M)
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(t["task"], t["items"], t["shots"]) for t in found["tasks"]] == [
        ("quiz", 3, 2), ("knock", 2, 0), ("texts", 2, 0), ("quiz", 3, 0),
    ]  # fmt: skip
    centred = [next(iter(t["metrics"].values()))["centred"] for t in found["tasks"] if t["task"] != "texts"]
    assert found["centred_accuracy"] == pytest.approx(sum(centred) / 3)
    records = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [r["item"] for r in records] == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2]
    before = (tmp_path / "items.jsonl").read_bytes()
    said(capsys, *command, "--items", tmp_path / "items.jsonl")
    assert (tmp_path / "items.jsonl").read_bytes() == before


def test_a_text_longer_than_the_context_is_said(tiny, tmp_path):
    items = [{"query": "word " * 40, "choices": ["a", "b"], "gold": 0}, CHOICES[0]]
    result = measure(load_task(write(tmp_path / "q.jsonl", items)), tiny[2], TOKENIZER)
    assert result.truncated == 1
    assert (
        "q: 1 items are longer" in "\n".join(table([result])) and results_json([result])["tasks"][0]["truncated"] == 1
    )
    assert centred_mean([result]) == result.metrics["acc_norm"].centred


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}
BAD = {
    '{"query": "q"\n': r"line 1 is not JSON",
    json.dumps(GOOD) + "\n[1]\n": r"line 2: wanted a JSON object, got a list",
    json.dumps(GOOD | {"gold": 2}) + "\n": r"line 1: gold=2: wanted 0 to 1",
    json.dumps(GOOD | {"gold": True}) + "\n": r"gold=True: wanted 0 to 1",
    json.dumps(GOOD | {"gold": []}) + "\n": r"gold is empty",
    json.dumps(GOOD)
    + "\n\n"
    + json.dumps(GOOD | {"choices": []})
    + "\n": r"line 3: choices are \[\]; wanted at least two",
    json.dumps(GOOD | {"choices": ["a", ""]}) + "\n": r"none empty",
    json.dumps(GOOD | {"choices": [["a"], {}]}) + "\n": r"wanted texts",
    json.dumps({"choices": ["a", "b"], "gold": 0}) + "\n": r"line 1 has no field 'query'; it has choices, gold",
    json.dumps({"a": 1}) + "\n": r"has no kind, and its first item has the fields a",
    json.dumps({"task": {"kind": "quiz"}}) + "\n" + json.dumps(GOOD) + "\n": r"kind='quiz': wanted one of",
    json.dumps({"task": {"shot": 1}}) + "\n" + json.dumps(GOOD) + "\n": r"no setting shot; did you mean shots\?",
    json.dumps({"task": {"shots": "5"}}) + "\n" + json.dumps(GOOD) + "\n": r"shots='5': wanted a value of type int",
    json.dumps({"task": {"items": "gone.jsonl"}}) + "\n": r"gone.jsonl can't be read: No such file",
    json.dumps({"task": {"where": ["query=z"]}}) + "\n" + json.dumps(GOOD) + "\n": r"has no items where query=z",
    json.dumps({"task": {"prompt": "{choices[5]}"}}) + "\n" + json.dumps(GOOD) + "\n": r"there is no number 5",
    json.dumps({"task": {"kind": "text"}}) + "\n" + json.dumps({"text": ""}) + "\n": r"its text is empty",
    json.dumps({"task": {"kind": "generation"}})
    + "\n"
    + json.dumps({"prompt": "", "answers": []})
    + "\n": r"one answer",
    "": r"has no items",
    "[" * 100_000 + "\n": r"is not JSON",
}


@pytest.mark.parametrize("content", BAD, ids=lambda content: repr(content)[:40])
def test_a_task_file_that_is_no_good_is_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    line = refused(capsys, "eval", tmp_path / "none", "--tasks", path)
    assert re.search(BAD[content], line) and "bad.jsonl" in line or "gone.jsonl" in line, line


def test_other_bad_input_is_refused_in_one_line(tmp_path, capsys):
    quiz = write(tmp_path / "quiz.jsonl", CHOICES)
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}')
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}')[:-9])
    (tmp_path / "head.json").write_text("{}")
    for arguments, wanted in {
        ("--tasks", "nowhere.jsonl"): "nowhere.jsonl can't be read: No such file",
        ("--tasks", "nothing"): "one of capitals",
        ("--tasks", f"{quiz}:shots=many"): "shots=many: wanted a whole number",
        ("--tasks", f"{quiz}:short=1"): "no setting short; did you mean shots?",
        ("--tasks", f"{quiz}:normalise=all"): "normalise='all': wanted one of",
        ("--tasks", f"{tmp_path}/x.jsonl"): "byte 0xff at offset 10 is not UTF-8",
        ("--tasks", f"{tmp_path}/x.jsonl.gz"): "can't be unpacked",
        ("--tasks", f"{tmp_path}/head.json"): "has no items",
        ("--tasks", str(tmp_path)): "Is a directory",
        ("--tasks", f"{quiz}:kind=text"): "line 1 has no field 'text'",
        ("--limit", "5"): "limit=5: wanted --tasks beside it",
        ("--tasks", quiz, "--template", "chatml"): "template='chatml': wanted none without --chat",
        ("--tasks", quiz, "--max-rows", "4"): "use --limit",
    }.items():
        assert wanted in refused(capsys, "eval", tmp_path / "none", *arguments)

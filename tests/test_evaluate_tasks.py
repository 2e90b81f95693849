"""Laws of evaluate.tasks: tasks measured while a model is trained, beside its training and not in it."""

import dataclasses
import json

import jax
import pytest
from corpora import BYTES

from gptjax.commands import evaluate_tasks
from gptjax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptjax.config.section import InputError
from gptjax.evals import score
from gptjax.evals.during import measure_tasks, named_tasks
from gptjax.runs.load import load_model
from gptjax.runs.run import Provenance
from gptjax.stages.pretrain import pretrain
from gptjax.training.metrics_file import MetricsFile

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
pytestmark = pytest.mark.usefixtures("compile_cache")
NAMES = ("task_words", "task_words_1shot", "task_plain", "task_next")


@pytest.fixture
def tasks(tmp_path, words) -> tuple[str, ...]:
    """One task of each kind but the last, and one of them with an example, on words of the text."""
    some = words.read_text().split()
    head = {"task": {"kind": "multiple_choice"}}
    items = [{"query": some[i], "choices": some[i + 1 : i + 4], "gold": i % 3} for i in range(0, 24, 4)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, [head, *items])))
    (tmp_path / "plain.txt").write_text(" ".join(some[:20]))
    items = [{"prompt": some[i], "answers": some[i + 1]} for i in range(3)]
    (tmp_path / "next.jsonl").write_text("\n".join(map(json.dumps, items)))
    few = f"{tmp_path}/words.jsonl"
    return few, f"{few}:shots=1", f"{tmp_path}/plain.txt", f"{tmp_path}/next.jsonl:max_new_tokens=4"


def settings(folder, words, tasks=(), **changes) -> TrainConfig:
    config = TrainConfig(
        run_dir=str(folder), steps=4, sinks=(), sample=False, mesh=MESH,
        model=ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32"), tokenizer=BYTES,
        data=DataConfig(source=str(words), length=64, batch_size=8), checkpoint=CheckpointConfig(every=2),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
        evaluate=EvaluateConfig(every=2, max_rows=4, tasks=tasks, limit=5),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def lines(run) -> list[dict]:
    """The lines of metrics.jsonl without what a clock says, and without tasks: those are (step, numbers)."""
    clock = ("seconds", "tokens_per_second", "mfu", "peak_memory")
    read = MetricsFile(run / "metrics.jsonl").read()
    return [{k: v for k, v in line.items() if not any(c in k for c in clock)} for line in read]


@pytest.mark.slow
def test_tasks_are_measured_at_each_evaluation_and_change_nothing(tmp_path, words, tasks):
    without = pretrain(settings(tmp_path / "without", words), Provenance())
    run = pretrain(settings(tmp_path / "run", words, tasks, steps=2), Provenance())
    pretrain(settings(tmp_path / "run", words, tasks), Provenance())  # goes on

    measured = {line["step"]: {k: v for k, v in line.items() if k.startswith("task_")} for line in lines(run)}
    assert [step for step, numbers in measured.items() if numbers] == [2, 4]
    assert measured[2].keys() == measured[4].keys() >= set(NAMES) and "task_words_stderr" in measured[4]
    assert measured[2]["task_plain"] > measured[4]["task_plain"], "bits per byte of its own text, which it learns"
    plain = [{k: v for k, v in line.items() if not k.startswith("task_")} for line in lines(run)]
    assert plain == lines(without), "bit for bit"
    page = (run / "report.html").read_text()
    assert all(name.removeprefix("task_") in page for name in NAMES)

    found = evaluate_tasks(run, EvalConfig(tasks=tasks, limit=5, mesh=MESH), print)
    values = [next(iter(result.metrics.values())).value for result in found]
    assert [measured[4][name] for name in NAMES] == values, "what `gptjax eval --tasks` says of the same weights"

    model = load_model(run, MESH)
    more = jax.tree.map(lambda x: x * 1.01, model.params)
    before = score._score._cache_size()
    asked = named_tasks(tasks[:3])
    for params in (model.params, more, more):
        numbers = measure_tasks(asked, model.decoder, params, model.tokenizer, model.mesh, 5)
    assert score._score._cache_size() == before and numbers["task_plain"] != measured[4]["task_plain"]


@pytest.mark.slow
def test_tasks_have_the_same_numbers_on_meshes(tmp_path, words, tasks):
    one, *others = [
        lines(pretrain(settings(tmp_path / str(i), words, tasks, mesh=mesh), Provenance()))[-1]
        for i, mesh in enumerate((MeshConfig(data=8), MESH, MeshConfig(data=1, fsdp=4, context=2)))
    ]
    assert one.keys() >= set(NAMES) and others == [pytest.approx(one, rel=1e-4)] * 2


def test_two_tasks_may_not_have_one_name(tasks):
    again = f"{tasks[0]}:where=query=x"
    with pytest.raises(InputError, match="no items where query=x"):
        named_tasks([again])
    with pytest.raises(InputError, match=r"words.jsonl: task_words is another task's name, too; add :name=\.\.\."):
        named_tasks([tasks[0], tasks[0]])
    assert list(named_tasks([tasks[0], f"{tasks[0]}:name=of words"])) == ["task_words", "task_of_words"]

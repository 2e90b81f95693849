"""Laws of supervised fine-tuning: the loss of the assistant's tokens alone, whole conversations, exact resume, LoRA."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import curve, refused
from stage_runs import MODEL, TOKENIZER, assert_same, lines, make_run, on_all_devices, stopped

import gptjax
from gptjax.cli import main
from gptjax.config import DataConfig, LoraConfig, MeshConfig, SftConfig
from gptjax.config.section import InputError
from gptjax.data.chats import ChatData
from gptjax.data.dialogue import messages_of
from gptjax.data.packing import pad_documents
from gptjax.data.rendered import held_out
from gptjax.model.decoder import init_params, make_decoder
from gptjax.ops.device import device
from gptjax.parallel.sharding import make_mesh
from gptjax.runs.load import load_model
from gptjax.runs.run import load_config, read_config
from gptjax.stages.tuning import Tuning
from gptjax.tokenizer import BytesTokenizer
from gptjax.tokenizer.known_templates import named_template
from gptjax.training.losses import language_model_loss
from gptjax.training.memory import count_memory

pytestmark = pytest.mark.usefixtures("compile_cache")
SFT = """--tokenizer.template llama2 --model.dtype float32 --data.length 64 --data.batch-size 8 --sinks --steps 6
--checkpoint.every 3 --evaluate.every 3 --optim.learning-rate 1e-2 --generate.max-new-tokens 4
--generate.prompt hello""".split()
LORA = ["--lora.rank", "2"]


def write(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Conversations of a question, its answer in capitals, and for some a second turn; the last does not fit."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        turns = []
        for _ in range(rng.randint(1, 2)):
            word = "".join(rng.choices("abcdef", k=rng.randint(1, 6)))
            turns += [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]
        lines.append(json.dumps({"messages": turns}))
    lines.append(json.dumps({"prompt": "x" * 99, "completion": "y"}))
    lines.append(json.dumps({"messages": [{"role": "user", "content": "no answer"}]}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, compile_cache) -> Path:
    """A run of bytes, as if it had been imported, with conversations beside it."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "a.txt").write_text("abcdef")
    write(folder / "chats.jsonl")
    return make_run(folder / "base")


def sft(base: Path, run: Path, *more: object, code: int = 0) -> Path:
    words = ["sft", "chat", "--init", base, "--data.source", base.parent / "chats.jsonl", "--run-dir", run, *SFT, *more]
    assert main(on_all_devices(words)) == code
    return run


@pytest.fixture(scope="module")
def tuned(base) -> Path:
    return sft(base, base.parent / "tuned")


@pytest.fixture(scope="module")
def adapted(base) -> Path:
    return sft(base, base.parent / "adapted", *LORA, "--no-sample")


def settings(base: Path, **more) -> SftConfig:
    data = DataConfig(source=str(base.parent / "chats.jsonl"), batch_size=8, length=64)
    return SftConfig(
        init=str(base), model=MODEL, data=data, tokenizer=dataclasses.replace(TOKENIZER, template="llama2"), **more
    )


def answers(source: Path) -> list[tuple[list[int], list[int]]]:
    template, tokenizer = named_template("llama2"), BytesTokenizer()
    records = map(json.loads, source.read_text().splitlines())
    return [template.render(tokenizer, messages_of(record, "x")) for record in records]


def test_the_loss_is_the_mean_over_the_assistants_tokens_and_packing_changes_none(base, highest_precision):
    """By hand: log p of each token of an answer and its end, each conversation in a row of its own."""
    config = settings(base)
    decoder, data = make_decoder(config), ChatData(config, base.parent / "none" / "data", training=True)
    params = jax.jit(init_params(decoder))(jax.random.key(0))
    packed = data.train.batch(0, data.train.num_rows)
    key = jax.random.key(0)
    loss, metrics = jax.jit(language_model_loss(decoder))(params, {}, packed, key)
    fit = [(ids, w) for ids, w in answers(Path(config.data.source)) if len(ids) <= 65 and any(w[1:])]
    trained = {tuple(ids) for ids in whole(packed)}
    kept = [(ids, w) for ids, w in fit if tuple(ids) in trained]
    assert len(kept) == len(whole(packed)) > data.train.num_rows, "several conversations share a row"
    alone = pad_documents([ids for ids, _ in kept], 64)
    inputs = (alone["inputs_BL"], alone["positions_BL"], alone["segments_BL"])
    x_BLD, _ = jax.jit(lambda p: decoder.apply({"params": p}, *inputs))(params)
    head_VD = params.get("head_VD", params["embed_VD"])
    log_p = np.asarray(jax.nn.log_softmax(jnp.einsum("BLD,VD->BLV", x_BLD, head_VD)[..., :258]), np.float64)
    total = count = 0.0
    for row, (ids, weights) in enumerate(kept):
        for i in range(1, len(ids)):
            total -= log_p[row, i - 1, ids[i]] * weights[i]
            count += weights[i]
    assert metrics["weight"] == count == sum(sum(w) for _, w in kept)
    np.testing.assert_allclose(loss, total / count, rtol=1e-6)


def whole(batch) -> list[list[int]]:
    """The ids of each conversation in a batch."""
    found = []
    for row, segments in enumerate(batch["segments_BL"]):
        for n in range(1, segments.max() + 1):
            inputs, targets = (batch[name][row][segments == n].tolist() for name in ("inputs_BL", "targets_BL"))
            found.append([*inputs, targets[-1]])
    return found


def test_what_is_held_out_shares_no_question_with_what_is_trained_on(base, tmp_path):
    config = settings(base)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.4))
    data = ChatData(config, tmp_path / "data", training=True)
    train = {tuple(ids) for ids in whole(data.train.batch(0, data.train.num_rows))}
    held = [tuple(ids) for batch in data.held.batches(0) for ids in whole(batch)]

    def question(ids: tuple[int, ...]) -> bytes:
        return bytes(i for i in ids if i < 256).split(b" [/INST]")[0]

    assert 12 < len(held) < 36 and not {question(ids) for ids in train} & {question(ids) for ids in held}
    fit = {tuple(ids) for ids, w in answers(Path(config.data.source)) if len(ids) <= 65 and any(w[1:])}
    assert train | set(held) == fit
    assert "1 of more than 65 tokens, 1 without an answer" in data.describe()
    lines = Path(config.data.source).read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[::-1]))
    turned = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(tmp_path / "other.jsonl")))
    again = ChatData(turned, tmp_path / "data", training=True)
    assert sorted(held) == sorted(tuple(ids) for batch in again.held.batches(0) for ids in whole(batch))
    hashes, usable = np.array([0.9, 0.8, 0.2, 0.9, 0.01]), np.array([True, True, True, True, False])
    assert held_out(hashes, usable, 0.05, "x").tolist() == [False, False, True, False, True], "one at least"
    assert held_out(hashes, usable, 0.95, "x").tolist() == [False, True, True, False, True], "and not all"


def test_a_run_is_tuned_says_what_it_left_out_and_is_opened_by_the_verbs(tuned, base, capsys, tmp_path):
    config = load_config(tuned)
    assert (config.stage, config.model.width, config.model.dropout) == ("sft", 16, 0.2)
    assert config.init == str(base) and read_config(tuned)["settings"]["model.width"]["from"] == "init"
    losses = [line["eval_loss"] for line in lines(tuned) if "eval_loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0] < 6
    samples = [json.loads(line) for line in (tuned / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [3, 6] and samples[0]["prompt"] == "hello"
    assert "report" in (tuned / "report.html").name and "validation" in (tuned / "report.html").read_text()
    assert main(["generate", str(tuned), "--chat", "--prompt", "abc", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["eval", str(tuned)]) == 0
    assert f"eval_loss {losses[-1]:.6g}"[:16] in capsys.readouterr().out
    assert main(["data", "show", str(tuned), "--step", "1"]) == 0
    assert "[INST]" in capsys.readouterr().out


def test_python_tunes_answers_and_measures_tasks_as_the_verbs_do(base, tuned, tmp_path, capsys):
    source = {"init": str(base), "data.source": str(base.parent / "chats.jsonl"), "run_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match="no stage 'tune'; wanted one of pretrain, sft"):
        gptjax.recipe("chat", source, stage="tune")
    small = {"tokenizer.template": "llama2", "data.length": 64, "data.batch_size": 8, "steps": 1, "sinks": ()}
    config = gptjax.recipe("chat", source | small | {"model.dtype": "float32", "sample": False}, stage="sft")
    assert isinstance(config, SftConfig) and config.model.width == MODEL.width, "the model is that of init"
    assert gptjax.train(config).step == 1 and load_config(tmp_path / "run").stage == "sft"
    capsys.readouterr()
    model, settings = gptjax.load(tuned), {"max_new_tokens": 4, "temperature": 0.0}
    answer = gptjax.chat(model, "abc", **settings)
    assert answer == gptjax.chat(model, [{"role": "user", "content": "abc"}], **settings)
    flags = ["--chat", "--prompt", "abc", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["generate", str(tuned), *flags]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    item = {"query": "abc", "choices": ["ABC", "XYZ"], "gold": 0}
    task = tmp_path / "task.jsonl"
    task.write_text('{"task": {"kind": "multiple_choice"}}\n' + json.dumps(item) + "\n")
    (found,) = gptjax.evaluate(model, tasks=[str(task)], chat=True)["tasks"]
    assert found["items"] == 1 and found["task"] == "task"


@pytest.mark.parametrize("kind", ["tuned", "adapted"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, request, base, tmp_path):
    straight = request.getfixturevalue(kind)
    moved = stopped(straight, tmp_path / "moved", 3)
    assert main(["sft", str(moved)]) == 0
    assert_same(moved, straight)


def test_an_adaptation_begins_as_its_base_and_is_opened_with_it(adapted, tuned, base, capsys):
    assert lines(adapted)[0]["loss"] == pytest.approx(lines(tuned)[0]["loss"], abs=1e-6), "b is 0"
    model, plain = load_model(adapted, MeshConfig()), load_model(base, MeshConfig())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), model.params, plain.params)
    assert moved["layers"]["q_NDHK"] and not moved["embed_VD"]
    assert lines(adapted)[-1]["eval_loss"] < [x for x in lines(adapted) if "eval_loss" in x][0]["eval_loss"]
    capsys.readouterr()
    assert main(["eval", str(adapted)]) == 0
    assert f"eval_loss {lines(adapted)[-1]['eval_loss']:.6g}"[:16] in capsys.readouterr().out
    elsewhere = base.with_name("elsewhere")
    base.rename(elsewhere)
    try:
        assert f"adapts step 0 of {base}, its base: " in refused(capsys, "generate", adapted)
        make_run(base, seed=1)
        assert f"adapts step 0 of {base}, whose weights are not what" in refused(capsys, "generate", adapted)
    finally:
        shutil.rmtree(base)
        elsewhere.rename(base)


def test_a_run_ends_early_where_its_evaluations_stop_falling(base, tmp_path, capsys, monkeypatch):
    """At step 6, the second evaluation that is not below the first, also where it was stopped and goes on.

    The base is merged once an evaluation, for the loss and the sample.
    """
    merged, init = [], Tuning.__init__

    def counted(self, *args, **more):
        init(self, *args, **more)
        merge = self._merge
        self._merge = lambda *args: merged.append(1) or merge(*args)

    monkeypatch.setattr(Tuning, "__init__", counted)
    words = ["--steps", 40, "--evaluate.every", 2, "--checkpoint.every", 4, "--optim.learning-rate", 1e-30]
    run = sft(base, tmp_path / "run", *words, "--evaluate.patience", 2, *LORA)
    said = "ended before step 40: 2 evaluations in a row found no eval_loss below that of step 2, "
    assert said in capsys.readouterr().err and len(merged) == 3
    assert [x["step"] for x in lines(run)][-2:] == [6, 6] and load_model(run, None).step == 6
    last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["step"]) == ("finished", 6) and last["reason"].startswith(said)
    before = curve((run / "metrics.jsonl").read_bytes())
    shutil.rmtree(run / "checkpoints" / "00000006")
    for _ in range(2):
        assert main(["sft", str(run)]) == 0
        assert said in capsys.readouterr().err
        assert curve((run / "metrics.jsonl").read_bytes()) == before
    assert main(["sft", str(run), "--evaluate.patience", "0", "--steps", "8"]) == 0
    assert lines(run)[-1]["step"] == 8


def test_the_memory_that_is_counted_holds_the_base(base):
    config = settings(base, lora=LoraConfig(rank=2))
    tuning = Tuning(config, make_mesh(MeshConfig()))
    sizes = dict(tuning.mesh.shape)
    alone, beside = (count_memory(config, tuning.shapes, sizes, device(), x) for x in ({}, tuning.frozen_shapes))
    assert beside - alone == sum(4 * x.size for x in jax.tree.leaves(tuning.weight_shapes))


@pytest.mark.slow
def test_tasks_are_asked_through_the_template(base, tmp_path):
    task = tmp_path / "task.jsonl"
    items = [{"task": {"kind": "cloze"}}, *({"context": word, "continuation": word.upper()} for word in ("abc", "d"))]
    task.write_text("\n".join(map(json.dumps, items)))
    run = sft(base, tmp_path / "run", "--evaluate.tasks", task)
    assert main(["eval", str(run), "--tasks", str(task), "--chat", "--items", str(tmp_path / "items")]) == 0
    greedy = [json.loads(line)["greedy"] for line in (tmp_path / "items").read_text().splitlines()]
    assert lines(run)[-1]["task_task"] == sum(greedy) / 2


@pytest.mark.slow
def test_a_mesh_and_accumulation_change_no_loss(base, tmp_path, highest_precision):
    more = ["--steps", "10", "--model.dropout", "0", "--mesh.data", "1"]
    for lora in ([], LORA):
        curves = {}
        for name, words in {
            "one": ["--mesh.fsdp", "8"],
            "mesh": ["--mesh.fsdp", "4", "--mesh.tensor", "2"],
            "parts": ["--mesh.fsdp", "4", "--mesh.tensor", "2", "--optim.accumulate", "2"],
        }.items():
            run = sft(base, tmp_path / f"{name}{len(lora)}", *more, *lora, *words)
            curves[name] = [x["loss"] for x in lines(run) if "loss" in x] + [lines(run)[-1]["eval_loss"]]
        assert len(curves["one"]) == 11
        for name in ("mesh", "parts"):
            np.testing.assert_allclose(curves[name], curves["one"], rtol=2e-5)


def test_wrong_input_is_one_line(base, tuned, tmp_path, capsys):
    chats = ["--data.source", base.parent / "chats.jsonl"]
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 99, "completion": "y"}) + "\n")
    small = ["--data.length", 64, "--mesh.data", 8, "--data.batch-size", 8, "--run-dir", tmp_path / "run"]
    named = [*small, "--init", base, "--tokenizer.template", "llama2"]
    wrong = {
        (*small, *chats): "init='': wanted the run to fine-tune",
        (*small, *chats, "--init", "runs/nope"): "runs/nope: no folder; wanted the folder of a run",
        (
            *small,
            *chats,
            "--init",
            base,
        ): "its tokenizer has no chat template; name one with --tokenizer.template",
        (*named, *chats, "--model.num-layers", 3): "model.num_layers=3: wanted 1, as in init=",
        (*named, "--data.source", "/nope.jsonl"): "source '/nope.jsonl' does not exist",
        (*named, "--data.source", base.parent / "a.txt"): "holds no conversations; wanted a file .jsonl",
        (*named, *chats, "--data.packing", "padded"): "data.packing='padded': wanted 'packed' with gptjax sft",
    }
    for words, said in wrong.items():
        assert said in refused(capsys, "sft", "chat", *words)
    assert main(["sft", "chat", *map(str, [*named, "--data.source", tmp_path / "long.jsonl"])]) == 2
    assert "0 of 1 conversations fit and have an answer" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert "goes on by: gptjax sft" in refused(capsys, "pretrain", tuned)
    assert "has no function sft()" in refused(capsys, "sft", "quickstart")
    other = shutil.copytree(tuned, tmp_path / "other")
    more = write(tmp_path / "more.jsonl", seed=1)
    assert main(["sft", str(other), "--data.source", str(more)]) == 2
    assert "its content is another, or the template is" in capsys.readouterr().err.splitlines()[-1]

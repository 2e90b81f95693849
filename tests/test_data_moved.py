"""Laws of a run whose data lies elsewhere now: data is compared by what it is, and only another text is refused."""

import random
import shutil
from pathlib import Path

import pytest
from commands import refused, said
from corpora import BYTES, prepared, write_jsonl

import gptjax
from gptjax.cli import main
from gptjax.config import TrainTokenizerConfig
from gptjax.config.section import InputError
from gptjax.data.prepare import train_tokenizer
from gptjax.runs.run import load_config
from gptjax.training.metrics_file import MetricsFile

SMALL = {
    "model.num_layers": 1, "model.width": 16, "model.num_heads": 2, "model.dtype": "float32", "data.length": 32,
    "data.batch_size": 8, "optim.schedule": "constant", "optim.warmup_steps": 0, "evaluate.max_rows": 4,
    "sample": False, "sinks": (),
}  # fmt: skip
PIECES = {"tokenizer.vocab_size": 300}
pytestmark = pytest.mark.usefixtures("compile_cache")


def train(folder: Path, steps: int, **settings) -> list[float]:
    """The losses of all steps of a run that is trained, or goes on, up to a step."""
    more = {name.replace("__", "."): str(value) for name, value in settings.items()}
    gptjax.train(gptjax.recipe("quickstart", SMALL | PIECES | more | {"run_dir": str(folder), "steps": steps}))
    return losses_of(folder)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in MetricsFile(run / "metrics.jsonl").read() if "loss" in line]


def flags(settings: dict) -> list[str]:
    """The words of a command line with small settings and these."""
    values = {n: v for n, v in {**SMALL, **settings}.items() if n not in ("sample", "sinks")}
    return [*(f"--{n.replace('_', '-')}={v}" for n, v in values.items()), "--no-sample", "--sinks"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, compile_cache) -> Path:
    """A text, its tokenizer, a corpus, and a run of four steps on each kind of data, with the losses of eight."""
    home, rng = tmp_path_factory.mktemp("home"), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
    (home / "text").mkdir()
    write_jsonl(home / "text" / "a.jsonl", [" ".join(rng.choices(words, k=rng.randint(9, 40))) for _ in range(300)])
    train_tokenizer(TrainTokenizerConfig(source=str(home / "text"), out=str(home / "tok"), vocab_size=300))
    for kind, settings in KINDS.items():
        if kind == "corpus":
            run = load_config(home / "run text")
            prepared(home / "text", home / "corpus", tokenizer=run.tokenizer)
        here = {name: home / value if value in PLACES else value for name, value in settings.items()}
        train(home / f"run {kind}", 4, **here)
        shutil.copytree(home / f"run {kind}", home / f"run {kind} to the end")
        losses[kind] = train(home / f"run {kind} to the end", 8, **here)
    return home


PLACES = ("text", "tok", "corpus")
KINDS = {
    "text": {"data__source": "text", "tokenizer__path": "tok"},
    "corpus": {"data__source": "corpus"},
    "stream": {"data__source": "text", "tokenizer__path": "tok", "data__loading": "stream"},
}
losses: dict[str, list[float]] = {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit_where_its_data_was_moved(tmp_path, home, kind, monkeypatch):
    for name in (*PLACES, f"run {kind}"):
        shutil.copytree(home / name, tmp_path / "elsewhere" / f"new {name}")  # the run is copied, too
    monkeypatch.chdir(tmp_path / "elsewhere")
    here = {name: f"new {value}" if value in PLACES else value for name, value in KINDS[kind].items()}  # relative
    assert train(Path(f"new run {kind}"), 8, **here) == losses[kind]
    assert load_config(f"new run {kind}").data.source == here["data__source"]


def test_a_run_goes_on_without_the_text_that_it_keeps_the_tokens_of(tmp_path, home, capfd):
    shutil.copytree(home / "run text", tmp_path / "run")
    gone = {"data.source": "/gone/text", "tokenizer.path": "/gone/tok"}
    assert main(["pretrain", "quickstart", *flags({**PIECES, **gone, "steps": 8, "run_dir": tmp_path / "run"})]) == 0
    assert losses_of(tmp_path / "run") == losses["text"]
    told = capfd.readouterr().err
    assert f"source /gone/text is not here; going on with the tokens of it in {tmp_path}/run/data" in told
    assert "tokenizer.path /gone/tok is not here; going on with the run's own" in told


@pytest.mark.parametrize("kind", KINDS)
def test_another_text_is_refused_with_both_names_and_changes_nothing(tmp_path, home, kind):
    shutil.copytree(home / f"run {kind}", tmp_path / "run")
    shutil.copytree(home / "text", tmp_path / "other")
    write_jsonl(tmp_path / "other" / "b.jsonl", ["one text more"])
    before = load_config(tmp_path / "run")
    other = tmp_path / "other"
    if kind == "corpus":
        other = prepared(other, tmp_path / "corpus", tokenizer=load_config(home / "run text").tokenizer).folder
    settings = {n: home / v if v in PLACES else v for n, v in KINDS[kind].items()} | {"data__source": other}
    with pytest.raises(InputError) as error:
        train(tmp_path / "run", 8, **settings)
    said = str(error.value)
    assert str(other) in said and before.data.source in said and "\n" not in said
    assert f"--init {tmp_path / 'run'} --run-dir OTHER" in said
    assert load_config(tmp_path / "run") == before


def test_a_corpus_that_is_gone_is_told_with_the_way_out(tmp_path, home, capsys):
    shutil.copytree(home / "run corpus", tmp_path / "run")
    line = refused(capsys, "pretrain", "quickstart", "--run-dir", tmp_path / "run", "--data.source", "/gone/corpus")
    assert "source '/gone/corpus' is not here, and this run keeps no tokens of it" in line
    assert "say where it is now: --data.source PATH" in line


def test_a_command_that_names_a_corpus_takes_its_tokenizer(tmp_path, home, capsys):
    corpus = prepared(home / "text", tmp_path / "bytes", tokenizer=BYTES).folder
    words = flags({"steps": 1, "run_dir": tmp_path / "run", "data.source": corpus})
    said(capsys, "pretrain", "quickstart", *words)
    taken = load_config(tmp_path / "run").tokenizer
    assert (taken.kind, taken.vocab_size, taken.path) == ("bytes", 258, "")
    for setting, value in (("vocab-size", 300), ("kind", "sentencepiece")):
        line = refused(capsys, "pretrain", "quickstart", *words, f"--tokenizer.{setting}", value)
        assert "but " in line and f"{corpus} was prepared with" in line and "leave it out" in line
    assert gptjax.recipe("gpt2", {"data.source": str(corpus)}).tokenizer == taken

"""report.html draws a run from its folder alone, loads nothing, stays small, and never ends a run."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from gptjax.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.runs import chart, report
from gptjax.runs.chart import Series
from gptjax.runs.events import write_event
from gptjax.runs.report import html_page, write_page
from gptjax.runs.run import Provenance, Run
from gptjax.stages import runner
from gptjax.stages.pretrain import pretrain
from gptjax.training.metrics_file import MetricsFile

CFG = TrainConfig(
    steps=40,
    model=ModelConfig(num_layers=1, width=16, num_heads=2),
    tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
    data=DataConfig(length=32, batch_size=8),
)
VOID = {"meta", "link", "path", "polyline", "circle"}


class Page(HTMLParser):
    """The page's words, tags and attributes; fails where tags do not close as they opened."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.tags, self.attributes, self.open = "", [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words += data + " "


def make_run(folder, steps: int = 30, **more) -> Run:
    """A run's folder with lines for so many steps, an evaluation every tenth."""
    run = Run.open(
        folder, dataclasses.replace(CFG, run_dir=str(folder)), Provenance("a.py", "ab12", {"steps": "recipe"})
    )
    file = MetricsFile(run.metrics_path)
    for step in range(1, steps + 1):
        rates = {"tokens_per_second": None if step == 1 else 1e3, "grad_norm": 1.0, "input_seconds": 1e-4}
        file.write(
            {"step": step, "loss": 8 / step, "tokens": 256 * step, "learning_rate": 1e-3, "seconds": step, **rates}
        )
        if step % 10 == 0:
            file.write({"step": step, "eval_loss": 9 / step, "eval_bits_per_byte": 1.5, **more})
    return run


def test_the_page_shows_curves_samples_settings_environment_and_events(tmp_path):
    run = make_run(tmp_path / "run")
    MetricsFile(run.samples_path).write({"step": 30, "prompt": "Once <b>", "text": " & upon\na time"})
    write_event(run.events_path, 0, "started", changes=[])
    write_event(run.events_path, 20, "resumed", changes=["optim.learning_rate was 0.1, now 0.2"])
    write_page(run)
    text = run.report_path.read_text()
    seen = Page(text)
    for words in ("running at step 30 of 40; 7,680 tokens, 0m30s", "Loss", "training 0.2667", "validation 0.3000",
                  "Learning rate", "Gradient norm", "Speed", "tokens a second", "Wait for input", "bits a byte",
                  "Once <b>", " & upon\na time", "from the recipe", "steps 40", "ab12", "jax", "python",
                  "resumed: optim.learning_rate was 0.1, now 0.2"):  # fmt: skip
        assert words in re.sub(" +", " ", seen.words), words
    assert seen.tags.count("figure") == 6
    write_event(run.events_path, 40, "finished")
    assert "finished at step 30" in html_page(run), "the last event is the run's state"


def test_the_page_loads_nothing_and_runs_no_script(tmp_path):
    run = make_run(tmp_path / "run")
    MetricsFile(run.samples_path).write({"step": 30, "prompt": "<script>", "text": '<img src="http://a.b/c">'})
    text = html_page(run)
    seen = Page(text)
    assert not {"script", "img", "iframe", "object", "form"} & set(seen.tags)
    assert {value for _, name, value in seen.attributes if name in ("href", "src", "action")} == {"data:,"}
    assert not re.search(r"url\(|@import|@font-face", text)


def test_the_page_is_below_2_mb_however_long_the_run_is(tmp_path):
    run = make_run(tmp_path / "run", steps=30_000)
    samples = MetricsFile(run.samples_path)
    for step in range(2000):
        if step % 20 == 19:
            samples.write({"step": step, "prompt": "p" * 10_000, "text": "<" * 100_000})
        write_event(run.events_path, step, "saved")
    samples.close()
    text = html_page(run)
    assert len(text) < 1.5e6 and "One step of 30 is drawn." in text and "1,900 earlier ones" in text
    seen = Page(text)
    assert "step 1,999" in seen.words and "running at step 30,000" in seen.words
    assert "validation 0.0003" in seen.words, "the last evaluation is always drawn"


def test_the_first_steps_after_a_start_do_not_hide_the_speed_of_the_others(tmp_path):
    run = make_run(tmp_path / "run", steps=30)
    file = MetricsFile(run.metrics_path)
    for step in range(31, 61):
        rate = None if step == 31 else 9e9 if step < 35 else 2000.0
        file.write({"step": step, "loss": 1.0, "tokens": step, "tokens_per_second": rate})
    speed = html_page(run).partition("<b>Speed</b>")[2].partition("</figure>")[0]
    assert "2k</text>" in speed and "G</text>" not in speed and "M</text>" not in speed


def test_torn_lines_numbers_that_are_none_and_a_run_without_lines_are_drawn(tmp_path):
    assert "figure" not in Page(html_page(make_run(tmp_path / "none", steps=0))).tags
    run = make_run(tmp_path / "run", steps=3)
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "loss": "nan", "grad_norm": "inf"}\n{"step": 5, "lo')
    assert "running at step 4 of 40" in html_page(run)
    assert "nan" not in "".join(re.findall('points="[^"]*"', html_page(run)))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3.21, 8.7), (2e-5, 2e-3), (5.0, 5.0), (0.0, 0.0), (-1.0, 1e9), (1e-9, 1e-9)]
)
def test_ticks_are_round_few_and_hold_the_curve(low, high):
    ticks = chart._ticks(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    assert len({chart._short(t) for t in ticks}) == len(ticks)
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in zip(ticks, ticks[1:])}
    assert steps == {1.0}
    if low > 0:
        decades = chart._decades(low, high)
        assert decades[0] <= low * (1 + 1e-9) and decades[-1] >= high * (1 - 1e-9) and len(decades) <= 7


def test_every_point_of_a_chart_lies_within_its_axes():
    points = [(step, 10.0 ** (step % 7 - 3)) for step in range(1, 500)]
    for log in (False, True):
        drawn = chart.chart("A", "b", [Series("c", points, str, noisy=True, dots=True)], log)
        spots = [
            tuple(map(float, p.split(","))) for line in re.findall('points="([^"]*)"', drawn) for p in line.split()
        ]
        assert len(spots) == 2 * len(points)
        assert all(chart.LEFT <= x <= chart.WIDTH - chart.RIGHT + 0.1 for x, _ in spots)
        assert all(chart.TOP - 0.1 <= y <= chart.HEIGHT - chart.BOTTOM + 0.1 for _, y in spots)
    assert chart.chart("A", "b", [Series("c", [(1, math.nan)], str)]) == ""


TINY = dataclasses.replace(
    CFG, steps=8, sinks=(), evaluate=dataclasses.replace(CFG.evaluate, every=4, max_rows=4),
    generate=dataclasses.replace(CFG.generate, prompt=("To be",), max_new_tokens=4),
)  # fmt: skip


@pytest.mark.usefixtures("compile_cache")
def test_each_evaluation_writes_a_sample_and_the_page_and_the_end_once_more(tmp_path, monkeypatch):
    written = []

    def write(run):
        write_page(run)
        written.append([event["kind"] for event in report.read_events(run.events_path)])

    monkeypatch.setattr(runner, "write_page", write)
    config = dataclasses.replace(TINY, run_dir=str(tmp_path / "run"))
    folder = pretrain(config, Provenance())
    assert written == [["started"], ["started", "saved"], ["started", "saved", "finished"]]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [4, 8] and all(s["prompt"] == "To be" and s["text"] for s in samples)
    seen = Page((folder / "report.html").read_text()).words
    assert "finished at step 8 of 8" in seen and samples[1]["text"] in seen


@pytest.mark.usefixtures("compile_cache")
def test_a_page_that_cant_be_written_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "write_file", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    folder = pretrain(dataclasses.replace(TINY, run_dir=str(tmp_path / "run")), Provenance())
    lines = [line for line in capsys.readouterr().err.splitlines() if "report.html" in line]
    assert len(lines) == 1 and "No space left" in lines[0] and "the run goes on without it" in lines[0]
    assert MetricsFile(folder / "metrics.jsonl").evaluation(8)

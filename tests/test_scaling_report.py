"""What gptjax fit writes and gptjax predict says of it: strict JSON, a page that needs nothing else, honest limits."""

import contextlib
import dataclasses
import fcntl
import html.parser
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from commands import refused, said

from gptjax.cli import main
from gptjax.config.scaling import FitConfig
from gptjax.scaling import plots, report
from gptjax.scaling.fitting import approaches, curves_of, two_point
from gptjax.scaling.laws import Chinchilla
from gptjax.scaling.predicting import summary
from gptjax.scaling.saved import KEYS, Fit, open_fit, strict
from gptjax.scaling.table import Curve, read_table

LAW = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
BUDGETS = [float(f"{c:.6g}") for c in np.geomspace(1e17, 1e19, 4)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Four budgets of five sizes on the law, with noise of 0.1 %; the largest budget is to be held out."""
    rng = np.random.default_rng(1)
    lines = ["name,budget,parameters,tokens,flops,loss,seed"]
    for budget in BUDGETS:
        best, _ = LAW.optimal(budget)
        for times in np.geomspace(0.3, 3, 5):
            n = round(best * times)
            d = round(budget / 6 / n)
            noisy = LAW.loss(n, d) * np.exp(rng.normal(0, 1e-3))
            lines.append(f"c{budget:.1e}-x{times:.2f},{budget},{n},{d},{6 * n * d},{noisy},0")
    path = tmp_path_factory.mktemp("table") / "<runs> & more.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def fitted(table, tmp_path_factory):
    """The folder of a fit to the smaller budgets, and what the verb said."""
    folder, out, err = tmp_path_factory.mktemp("fits") / "fit", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["fit", str(table), "--out", str(folder), "--max-flops", "5e18", "--bootstraps", "40"])
    assert code == 0, err.getvalue()
    return folder, out.getvalue(), err.getvalue()


def load(path):
    """A JSON file, by the letter of the standard."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def predicted(capsys, fit, folder, *args):
    """What gptjax predict prints, and its JSON file."""
    out = said(capsys, "predict", fit, *args, "--json", folder / "p.json")
    return out, load(folder / "p.json")


def test_a_fit_says_on_one_screen_what_it_found_and_what_it_could_not_do(fitted, table):
    folder, out, err = fitted
    assert len(out.splitlines()) <= 30 and all(len(line) <= 240 for line in out.splitlines())
    assert all(word in out for word in ("alpha", "isoflop", "parametric", "leave one budget out", "5 left out"))
    assert re.search(r"envelope +not done: no training curves", out)
    assert f"wrote {folder}/fit.json" in err and err.splitlines()[-1].startswith("next: gptjax predict ")
    assert "--against" in err.splitlines()[-1]  # what was left out can be predicted


def test_fit_json_is_strict_and_holds_the_points_their_range_and_the_law(fitted, table):
    folder, _, _ = fitted
    document = load(folder / "fit.json")
    assert set(KEYS) == set(document) and document["table"]["points"] == 15 and document["table"]["left_out"] == 5
    assert document["range"]["flops"][1] == pytest.approx(BUDGETS[2], rel=1e-3)
    for name, found in document["coefficients"].items():
        low, high = found["interval"]
        assert low <= found["value"] <= high, name
    assert document["coefficients"]["alpha"]["value"] == pytest.approx(0.34, rel=0.2)
    assert len(document["fitted"]["samples"]["E"]) == 40
    left = document["leave_one_out"]
    assert [row["beyond"] for row in left["budgets"]] == [False, False, True]
    assert all(abs(row["error"]) < 0.02 for row in left["budgets"])


def test_exponents_of_the_approaches_are_those_of_the_law(fitted):
    found = load(fitted[0] / "fit.json")["approaches"]
    for name in ("isoflop", "parametric"):
        a, b = found[name]["exponents"]["N"], found[name]["exponents"]["D"]
        assert a == pytest.approx(LAW.exponents[0], abs=0.05) and a + b == pytest.approx(1, abs=0.02)
        low, high = found[name]["intervals"]["N"]
        assert low <= a <= high
    assert not found["envelope"]["done"] and found["envelope"]["why"]


class Page(html.parser.HTMLParser):
    """What a page asks for and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.asks, self.images = [], [], 0

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.asks += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:image/png;base64,")]
        self.images += tag == "img" and bool(given.get("alt"))
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_that_asks_for_nothing_else(fitted):
    folder, _, _ = fitted
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.asks == [] and page.images == 4
    assert "url(" not in text and "@import" not in text and "http" not in text and "color-scheme" in text
    assert "&lt;runs&gt; &amp; more.csv" in text and "<runs>" not in text  # a name from outside is text, not a tag
    names = {p.name for p in (folder / "plots").iterdir()}
    assert names == {"losses.png", "isoflop.png", "optimum.png", "residuals.png"}
    assert all((folder / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_without_matplotlib_the_report_has_no_plots_and_says_so(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "have_matplotlib", lambda: False)
    monkeypatch.setattr(report, "have_matplotlib", lambda: False)
    assert report.write_report(open_fit(fitted[0]), tmp_path) == ["fit.json", "report.html"]
    text = (tmp_path / "report.html").read_text()
    assert "<img" not in text and "matplotlib is not installed" in text
    assert "matplotlib is not installed" in report.screen(open_fit(fitted[0]))[-1]


def test_predictions_of_a_budget_have_intervals_and_a_recipe_with_its_source(fitted, tmp_path, capsys):
    out, made = predicted(capsys, fitted[0], tmp_path / "deep", "--flops", BUDGETS[3])
    n, d = LAW.optimal(BUDGETS[3])
    assert made["parameters"] == pytest.approx(n, rel=0.2) and made["tokens"] == pytest.approx(d, rel=0.2)
    assert made["loss"] == pytest.approx(float(LAW.loss(n, d)), rel=0.01)
    assert made["loss_interval"][0] < made["loss"] < made["loss_interval"][1]
    assert made["parameters_interval"][0] < made["parameters"] < made["parameters_interval"][1]
    assert made["recipe"]["source"] in out and made["recipe"]["batch_tokens"] > 0
    assert "extrapolated: " in out and "decades above the largest fitted" in out
    assert set(made["approaches"]) == {"isoflop", "parametric"}


def test_a_run_within_the_points_is_no_extrapolation(fitted, capsys):
    n, d = (float(x) for x in LAW.optimal(1e18))
    out = said(capsys, "predict", fitted[0], "--parameters", n * 1.5, "--tokens", d)
    assert "within the fitted points" in out and "extrapolated" not in out
    loss, low, high = (float(x) for x in re.search(r"loss ([\d.]+) \[([\d.]+), ([\d.]+)\]", out).groups())
    assert low < loss < high and loss == pytest.approx(float(LAW.loss(n * 1.5, d)), rel=0.01)


@pytest.mark.parametrize("flops, side", [(1e21, "above the largest"), (1e15, "below the smallest")])
def test_more_than_a_decade_is_refused_unless_it_is_asked_for(fitted, capsys, flops, side):
    line = refused(capsys, "predict", fitted[0], "--flops", flops)
    assert side in line and "decades" in line and "--extrapolate" in line
    out = said(capsys, "predict", fitted[0], "--flops", flops, "--extrapolate")
    assert f"extrapolated: {flops:.3g} FLOPs are" in out and side in out


def test_a_size_far_outside_is_refused_though_its_flops_are_not(fitted, capsys):
    assert "parameters are" in refused(capsys, "predict", fitted[0], "--parameters", 1e12, "--tokens", 1e6)


def test_a_budget_whose_best_size_is_far_outside_is_refused(fitted, tmp_path, capsys):
    document = load(fitted[0] / "fit.json")
    document["range"]["tokens"] = [d / 100 for d in document["range"]["tokens"]]
    (tmp_path / "fit.json").write_text(json.dumps(document))
    line = refused(capsys, "predict", tmp_path, "--flops", BUDGETS[2])
    assert "tokens are" in line and "decades above" in line and "--extrapolate" in line


def test_a_table_is_held_against_the_fit_row_by_row(fitted, table, tmp_path, capsys):
    out, made = predicted(capsys, fitted[0], tmp_path, "--against", table)
    assert [row["fitted"] for row in made["rows"]] == [True] * 15 + [False] * 5
    unseen = [row for row in made["rows"] if not row["fitted"]]
    assert made["unseen"]["rows"] == 5 and made["unseen"]["mean_error"] < 0.01
    for row in made["rows"]:
        assert row["error"] == pytest.approx(row["predicted"] / row["loss"] - 1)
        assert row["within"] == (row["interval"][0] <= row["loss"] <= row["interval"][1])
    best = min(unseen, key=lambda row: row["loss"])
    assert made["unseen"]["best"]["mean_two_point_error"] == pytest.approx(abs(best["two_point_error"]))
    assert made["unseen"]["best"]["mean_error"] < made["unseen"]["best"]["mean_two_point_error"]
    assert "unseen, 5 rows: mean |error|" in out and "two-point line" in out and "extrapolated" in out
    _, made = predicted(capsys, fitted[0], tmp_path, "--against", table, "--where", "flops>5e18")
    assert len(made["rows"]) == 5


def test_runs_that_are_planned_are_predicted_before_they_have_losses(fitted, table, tmp_path, capsys):
    lines = [line.split(",") for line in table.read_text().splitlines()]
    planned = tmp_path / "planned.csv"
    planned.write_text("".join(",".join(line[:5]) + "\n" for line in (lines[0], *lines[-5:])))
    out, made = predicted(capsys, fitted[0], tmp_path, "--against", planned)
    rows = made["rows"]
    assert len(rows) == 5 and "5 planned runs" in out and not any({"loss", "error", "fitted"} & set(r) for r in rows)
    later = predicted(capsys, fitted[0], tmp_path, "--against", table)[1]["rows"][-5:]  # the runs are there now
    for key in ("predicted", "interval", "two_point"):
        assert [row[key] for row in rows] == [row[key] for row in later]


def test_the_two_point_line_goes_through_the_two_largest_budgets(table):
    points = read_table([table]).up_to(5e18)
    line = two_point(points)
    for budget in BUDGETS[1:3]:
        of = points.budget == budget
        best = np.argmin(points.loss[of])
        assert line.loss(points.flops[of][best]) == pytest.approx(points.loss[of][best], rel=1e-12)
    assert line.slope < 0 and two_point(points.up_to(2e17)) is None


def test_one_lucky_seed_does_not_make_its_size_the_best(table, tmp_path):
    # In the largest budget the smallest size has the least loss of all with one seed, and the greatest with the other.
    header, *lines = table.read_text().splitlines()
    rows = [line.split(",") for line in lines if line.split(",")[1] == f"{BUDGETS[-1]}"]
    least = min(float(row[5]) for row in rows)
    twins = [[*row[:5], f"{float(row[5]) * (1.02 if i else 1.2)}", "1"] for i, row in enumerate(rows)]
    rows[0] = [*rows[0][:5], f"{0.99 * least}", "0"]
    seeded = tmp_path / "seeded.csv"
    kept = [line.split(",") for line in lines if line.split(",")[1] != f"{BUDGETS[-1]}"]
    seeded.write_text("\n".join(",".join(row) for row in ([header], *kept, *rows, *twins)) + "\n")
    points = read_table([seeded])
    best = points.best(BUDGETS[-1])
    assert len(best) == 2 and points.loss[best].min() == pytest.approx(least)
    assert two_point(points).losses[1] == pytest.approx(1.01 * least)
    same = {"name": "", "budget": 1.0, "tokens": 1.0, "predicted": 2.02, "two_point": 2.04}
    runs = ((1, 1.9), (1, 2.5), (2, 2.0), (2, 2.04))
    lucky = [same | {"parameters": n, "loss": loss, "error": 2.02 / loss - 1} for n, loss in runs]
    assert summary(lucky)["best"] == {
        "rows": 1, "mean_error": pytest.approx(0.0), "mean_two_point_error": pytest.approx(0.02 / 2.02)
    }  # fmt: skip


def test_training_curves_make_an_envelope(fitted, table):
    points = read_table([table])
    tokens = [np.geomspace(d / 20, d * 3, 60) for d in points.tokens]
    curves = tuple(Curve(t, LAW.loss(n, t)) for n, t in zip(points.parameters, tokens))
    cfg = FitConfig(bootstraps=20, approach="envelope")
    points = dataclasses.replace(points, curves=curves, evaluated=True)
    found = approaches(points, lambda: open_fit(fitted[0]).fitted, 6.0, cfg)
    assert "evaluations along 20 runs" in found["envelope"]["notes"][0]
    assert found["envelope"]["done"] and found["envelope"]["exponents"]["N"] == pytest.approx(0.45, abs=0.08)
    assert json.dumps(strict(found), allow_nan=False)


def test_finished_runs_of_a_size_are_curves_before_training_losses_are(table):
    points = read_table([table])
    training = tuple(Curve(np.geomspace(1e8, 1e9, 9), np.full(9, 9.0)) for _ in points.names)
    points = dataclasses.replace(points, curves=training)
    assert "training losses" in curves_of(points)[2]
    n = np.array([1e8, 2e8, 4e8] * 6)[: len(points)]
    d = np.array([1e9] * 9 + [4e9] * 9 + [1e9, 1e9])
    points = dataclasses.replace(points, parameters=np.append(n, [3e8, 5e8]), tokens=d)
    curves, whole, how = curves_of(points)
    assert not whole
    assert [size for size, _, _ in curves] == [1e8, 2e8, 4e8] and "finished runs of each of 3 sizes" in how
    of = (points.parameters == 2e8) & (points.tokens == 4e9)  # several seeds are one point
    assert list(curves[1][1]) == [1e9, 4e9] and curves[1][2][1] == pytest.approx(points.loss[of].mean())


def test_a_fit_without_resamples_has_no_intervals_and_says_so(fitted, tmp_path, capsys):
    document = load(fitted[0] / "fit.json")
    document["fitted"]["samples"] = {}
    for found in (*document["coefficients"].values(), *(a for a in document["approaches"].values() if a["done"])):
        found["interval"], found["intervals"], found["band"] = None, {"N": None, "D": None}, None
    (tmp_path / "fit.json").write_text(json.dumps(document))
    out, made = predicted(capsys, tmp_path, tmp_path, "--flops", "1e18")
    assert "(no interval)" in out and made["loss_interval"] is None
    report.write_report(open_fit(tmp_path), tmp_path / "again")
    assert "no interval" in (tmp_path / "again" / "report.html").read_text()
    assert any("no interval" in line for line in report.screen(open_fit(tmp_path)))


def test_an_approach_that_was_asked_for_and_can_not_be_done_is_refused(table, tmp_path, capsys):
    line = refused(capsys, "fit", table, "--out", tmp_path / "out", "--approach", "envelope", "--bootstraps", "0")
    assert "--approach envelope: no training curves" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, words", [
    ([], ["nothing to predict", "--flops 1e21"]),
    (["--flops", "1e18", "--parameters", "1e9", "--tokens", "1e9"], ["wanted one of"]),
    (["--parameters", "1e8"], ["tokens=0.0", "beside --parameters"]),
    (["--tokens", "1e8"], ["parameters=0.0", "beside --tokens"]),
    (["--flops", "-1"], ["flops=-1.0"]),
    (["--flops", "nan"], ["flops=nan"]),
    (["--flop", "1e18"], ["did you mean --flops?"]),
    (["--against", "nowhere.csv"], ["nowhere.csv: no such file"]),
])  # fmt: skip
def test_a_question_that_makes_no_sense_is_refused(fitted, capsys, args, words):
    line = refused(capsys, "predict", fitted[0], *args)
    assert all(word in line for word in words), line


def test_what_is_no_fit_is_refused(fitted, tmp_path, capsys):
    document = load(fitted[0] / "fit.json")
    del document["range"]
    files = {"{": "not valid JSON", '{"format": 99}': "format 99; wanted 1", json.dumps(document): "'range' is missing"}
    assert "no such file" in refused(capsys, "predict", tmp_path, "--flops", "1e18")
    for text, message in files.items():
        (tmp_path / "fit.json").write_text(text)
        assert message in refused(capsys, "predict", tmp_path, "--flops", "1e18")
    assert "FIT is missing" in refused(capsys, "predict")


def test_a_folder_that_can_not_be_written_is_told(fitted, table, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "predict", fitted[0], "--flops", "1e18", "--json", tmp_path / "file" / "p.json")
    assert "can't be written" in line
    line = refused(capsys, "fit", table, "--out", tmp_path / "file")
    assert "there is a file of that name" in line


def test_approaches_that_disagree_beyond_their_intervals_are_the_first_line(fitted):
    document = load(fitted[0] / "fit.json")
    assert not report.screen(open_fit(fitted[0]))[0].startswith("warning")
    ways = document["approaches"]
    ways["isoflop"] |= {"exponents": {"N": 0.9, "D": 0.1}, "intervals": {"N": [0.85, 0.95], "D": [0.05, 0.15]}}
    ways["parametric"]["intervals"] = {"N": [0.4, 0.849], "D": [0.3, 0.6]}
    fit = Fit(document)
    first = report.screen(fit)[0]
    assert first.startswith("warning: the approaches disagree") and "C^0.900 [0.850, 0.950] by isoflop" in first
    assert "warning: the approaches disagree" in report.page(fit, {})
    ways["parametric"]["intervals"]["N"][1] = 0.851
    assert not report.screen(Fit(document))[0].startswith("warning")


def test_the_page_says_what_approaches_assume_and_how_many_sizes_a_minimum_rests_on(fitted):
    document, page = load(fitted[0] / "fit.json"), report.page(open_fit(fitted[0]), {})
    assert "isoflop assumes: " in page and "parametric assumes: " in page and "envelope assumes" not in page
    minima = document["approaches"]["isoflop"]["minima"]
    assert [minimum["budget"] for minimum in minima] == pytest.approx(BUDGETS[:3])
    assert all(minimum["N"]["sizes"] == 5 for minimum in minima) and "sizes used" in page
    assert any(
        "The minima of 3 budgets rest on 5 sizes each." in note for note in document["approaches"]["isoflop"]["notes"]
    )


def test_a_fit_on_a_terminal_is_not_silent(table, tmp_path):
    """A line with a clock: every 2 seconds something is written, also before jax is there."""
    code, gaps, text = on_a_terminal("fit", table, "--out", tmp_path, "--bootstraps", 200)
    assert code == 0 and "approach: isoflop" in text and "leaving each of 4 budgets out" in text
    assert max(gaps) < max(2, sum(gaps) / 4)  # beside other work imports alone may take longer


def on_a_terminal(*words):
    """The exit code of a command under a terminal of 80 columns, seconds between its outputs, and these."""
    begin, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "gptjax", *map(str, words)]
    process = subprocess.Popen(command, stdout=end, stderr=end, stdin=subprocess.DEVNULL)
    os.close(end)
    times, text = [time.monotonic()], b""
    with contextlib.suppress(OSError), open(begin, "rb", buffering=0) as terminal:
        while chunk := terminal.read(65536):
            times.append(time.monotonic())
            text += chunk
    return process.wait(), np.diff(times), text.decode()


def test_labels_of_the_plots_do_not_overlap():
    pytest.importorskip("matplotlib")
    ladder = Path(__file__).parents[1] / "benchmarks" / "results" / "scaling_ladder" / "fit"
    for name, figure in plots.figures(open_fit(ladder)).items():
        figure.draw_without_rendering()
        for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
            labels = [label for label in axis.get_ticklabels(which="both") if label.get_text() and label.get_visible()]
            boxes = [label.get_window_extent() for label in labels]
            for i, box in enumerate(boxes):
                over = [labels[j].get_text() for j in range(i) if box.overlaps(boxes[j])]
                assert not over, f"{name}: {labels[i].get_text()} lies over {over}"

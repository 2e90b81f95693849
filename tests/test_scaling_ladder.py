"""The ladder's benchmark: its corpus, its plan, its clock, and that a prediction can't be changed after its runs."""

import csv
import io
import json

import ladder_corpus
import pytest
import scaling_ladder

from gptjax.cli import main
from gptjax.config.command_line import load_recipe
from gptjax.config.sweep import SweepConfig
from gptjax.scaling.saved import open_fit
from gptjax.scaling.sweep.points import make_points


def test_descriptions_are_prose_without_tags_and_short_lines():
    first = "Returns the <code>Arn</code> of every queue that this account may read &amp; write."
    second = "Another sentence of more than forty characters here."
    shapes = [{"description": second}, {"name": "Queue"}]
    tree = {"documentation": f"<p>{first}</p><p>short</p>", "shapes": shapes}
    lines = [line for text in ladder_corpus.descriptions(tree) for line in ladder_corpus.plain(text)]
    assert lines == ["Returns the Arn of every queue that this account may read & write.", second]


def test_the_plan_has_the_points_of_the_grid_near_their_budgets():
    file = io.StringIO()
    cfg = SweepConfig(grid=("2.13e13:4,5", "3.79e13:6@1"))
    scaling_ladder.plan(make_points(cfg, load_recipe(str(scaling_ladder.RECIPE))), file)
    file.seek(0)
    rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["4_2.13e13_0", "5_2.13e13_0", "6_3.79e13_1"]
    for row in rows:
        assert float(row["flops"]) == pytest.approx(float(row["budget"]), rel=1e-3)
        assert float(row["flops"]) > 6 * 0.9 * float(row["parameters"]) * float(row["tokens"])


def test_what_is_fitted_has_no_rows_of_other_points(tmp_path):
    (tmp_path / "table.csv").write_text("name,loss\n4_2.13e13_0,3.25\n4_3.79e13_0,3.125\n")
    wanted = make_points(SweepConfig(grid=("2.13e13:4",)), load_recipe(str(scaling_ladder.RECIPE)))
    scaling_ladder.select(tmp_path / "table.csv", wanted, tmp_path / "fitted.csv")
    assert (tmp_path / "fitted.csv").read_text() == "name,loss\n4_2.13e13_0,3.25\n"


def event(time, job, kind, process=1):
    return {"time": time, "job": job, "process": process, "event": kind}


def test_time_in_which_runs_overlap_is_counted_once_and_pauses_not_at_all(tmp_path):
    times = tmp_path / "times.jsonl"
    events = [event(0, "a", "start"), event(4, "b", "start"), event(10, "a", "end"), event(12, "b", "end"),
              event(100, "c", "start", 2), event(103, "c", "end", 2), event(200, "killed", "start", 3),
              event(210, "killed", "start", 4), event(215, "killed", "end", 4), event(300, "d", "start")]  # fmt: skip
    times.write_text("".join(json.dumps(e) + "\n" for e in events))
    assert scaling_ladder.seconds(times) == {"clock": 30.0, "sum": 36.0}


@pytest.mark.parametrize("shift", [0.0, 1e-9])
def test_a_fit_that_was_changed_after_its_prediction_is_told(tmp_path, shift):
    rows = [{"name": "5_1e13_0", "predicted": 3.25, "loss": 3.3, "fitted": False}]
    (tmp_path / "prediction.json").write_text(json.dumps({"rows": [rows[0] | {"predicted": 3.25 + shift}]}))
    (tmp_path / "held_out.json").write_text(json.dumps({"rows": rows, "unseen": {"rows": 1}}))
    (tmp_path / "table.csv").write_text("name,bits_per_byte\n5_1e13_0,1.5\n")
    if shift:
        with pytest.raises(SystemExit, match="5_1e13_0.*not the one in prediction.json"):
            scaling_ladder.summarise(tmp_path)
    else:
        assert scaling_ladder.summarise(tmp_path)["runs"][0]["bits_per_byte"] == 1.5


@pytest.mark.slow
def test_the_law_of_least_rolling_origin_error_uses_fitted_runs_alone(tmp_path, monkeypatch):
    lines = ["budget,parameters,parameters_non_embedding,tokens,flops,loss"]
    for budget in (1e12, 2e12, 4e12, 8e12, 16e12):
        for n in (4e4, 8e4, 16e4):
            total, tokens = 1e4 + n, budget / 6 / n
            loss = 1 + 30 / n**0.3 + 30 / tokens**0.3  # one exponent, of non-embedding parameters
            lines.append(f"{budget},{total},{n},{tokens},{budget},{loss}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    one_exponent = (("overtraining", "total"), ("overtraining", "non-embedding"))
    monkeypatch.setattr(scaling_ladder, "LAWS", one_exponent)
    total, without = scaling_ladder.rolling_origin(tmp_path / "table.csv", tmp_path / "work")
    assert list(without["errors"]) == ["4e+12", "8e+12"]
    assert without["mean"] < 1e-4 < total["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["scaling_ladder/fit", "scaling_ladder_muon/fit", "scaling_ladder_muon/law"])
def test_a_committed_fit_is_what_its_command_gives_today(fit, tmp_path):
    folder = scaling_ladder.ROOT / "benchmarks" / "results" / fit
    then = open_fit(folder)
    law = ("--law", then.document["settings"]["law"], "--count", then.document["settings"]["count"])
    assert main(["fit", str(folder.parent / "fitted.csv"), "--out", str(tmp_path), *law]) == 0
    now = open_fit(tmp_path)
    for name, coefficient in then.document["coefficients"].items():
        found = now.document["coefficients"][name]
        for key in ("value", "interval"):
            assert found[key] == pytest.approx(coefficient[key], rel=1e-2, abs=1e-6), (name, key)
    assert now.points["predicted"] == pytest.approx(then.points["predicted"], rel=1e-6)
    for name, approach in then.approaches.items():
        found = now.approaches[name]
        assert found["done"] == approach["done"] and found.get("notes") == approach.get("notes"), name
        if approach["done"]:
            assert found["exponents"] == pytest.approx(approach["exponents"], rel=1e-4), name
            for key, edges in approach["intervals"].items():
                assert found["intervals"][key] == (edges and pytest.approx(edges, rel=1e-2, abs=1e-3)), (name, key)

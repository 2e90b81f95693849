"""A ladder of tiny models on real text, from fetching to report: a scaling law, held to runs that it has not seen.

    python benchmarks/scaling_ladder.py --out DIR --until prediction   # writes DIR/fit and DIR/prediction.json: commit
    python benchmarks/scaling_ladder.py --out DIR                      # trains the held-out budgets, compares, reports
    python benchmarks/scaling_ladder.py --out DIR --refit              # from DIR's tables alone; trains nothing

The second command alone does all of it; the first stops before anything that is predicted has been trained, so that the
prediction can be published before its runs. Each step is a verb of gptjax and is not done again where it is done: a
killed ladder goes on.

The corpus: ladder_corpus.py (49 MB), prepared with a SentencePiece vocabulary of 1,024. The models: configs/ladder.py.
Budgets are training FLOPs, forward and backward, of the products and of causal attention (gptjax.scaling.counts). Five
budgets over one decade are fitted, with 3 sizes each and 5 in the middle one, and the next half decade, 2 budgets
with 3 sizes, is held out; all with two seeds. Loss is that of the validation split, in nats a token.

Which law predicts is decided by the fitted runs alone, by their rolling origin: each law is fitted without the largest
budget, and without the two largest, and the one that misses their best runs least is taken (laws.json has them all).
What is compared: its prediction of each held-out run and of each budget's best run, and beside it what a straight line
in log loss and log FLOPs through the best runs of the two largest fitted budgets says. Writes fit/ (Chinchilla's three
approaches: JSON, report, plots), laws.json, law/ (the fit that predicts), prediction.json, held_out.json, table.csv and
summary.json.
"""

import argparse
import csv
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from ladder_corpus import write
from report import ROOT, facts

from gptjax.config.command_line import load_recipe
from gptjax.config.sweep import SweepConfig
from gptjax.runtime.process import usable_cores
from gptjax.scaling.sweep.points import Point, make_points

RECIPE, VOCAB = ROOT / "configs" / "ladder.py", 1024
DTYPE = "model.dtype=float32"  # of all machines that add points
FITTED = ("1.2e12:2,3,4@0,1", "2.13e12:3,4,6@0,1", "3.79e12:4,5,6,7,8@0,1", "6.75e12:6,7,9@0,1", "1.2e13:8,10,11@0,1")
LAWS = tuple((law, count) for law in ("chinchilla", "overtraining", "kaplan") for count in ("total", "non-embedding"))
HELD_OUT = ("2.13e13:10,11,12@0,1", "3.79e13:12,13,14@0,1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling_ladder"), help="folder for corpus and runs")
    parser.add_argument("--until", choices=("prediction", "report"), default="report")
    parser.add_argument("--refit", action="store_true", help="fit and compare the tables that are in --out again")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="runs at a time, each on its own cores")
    parser.add_argument("--fitted", nargs="+", default=list(FITTED), help="points to fit, as gptjax sweep's --grid")
    parser.add_argument("--held-out", nargs="+", default=list(HELD_OUT), help="points to predict")
    args = parser.parse_args()
    if args.refit:
        refit(args.out, args.work)
        return
    corpus, sweep = args.work / "corpus", args.work / "sweep"
    text = args.work / "corpus.jsonl"
    if not text.exists():
        print(write(text))
    verb("prepare", "--source", text, "--out", corpus, "--tokenizer.vocab-size", VOCAB)
    source = f"data.source={shlex.quote(str(corpus))}"
    training = ("sweep", RECIPE, "--out", sweep, "--workers", args.workers, "--set", source, DTYPE, "--grid")

    def points(*grid: str) -> list[Point]:
        return make_points(SweepConfig(out=str(sweep), grid=grid, set=(source, DTYPE)), load_recipe(str(RECIPE)))

    if not (args.out / "prediction.json").exists():
        verb(*training, *args.fitted)
        args.out.mkdir(parents=True, exist_ok=True)
        select(sweep / "table.csv", points(*args.fitted), args.out / "fitted.csv")
        with (args.out / "planned.csv").open("w") as file:
            plan(points(*args.held_out), file)
        fit(args.out, args.work)
    if args.until == "prediction":
        return
    verb(*training, *args.fitted, *args.held_out)
    select(sweep / "table.csv", points(*args.fitted, *args.held_out), args.out / "table.csv")
    ran = facts(f"{usable_cores()} CPU cores", "jax", "numpy") | {"seconds_of_runs": seconds(sweep / "times.jsonl")}
    report(args.out, args.work, ran)


def refit(out: Path, work: Path) -> None:
    """Fits, predicts and compares again from a report's own tables; its facts stay those of the runs."""
    before = json.loads((out / "summary.json").read_text())
    again = facts(f"{usable_cores()} CPU cores", "jax", "numpy")
    fit(out, work, choose=(out / "laws.json").exists())  # earlier ladders predicted by Chinchilla's law, unchosen
    ran = {name: before[name] for name in ("date", "command", "commit", "device", "versions", "seconds_of_runs")}
    report(out, work, ran | {"refitted": again})


def fit(out: Path, work: Path, choose: bool = True) -> None:
    """Fits Chinchilla's law to fitted.csv and, where one is to be chosen, the law of the least error; predicts."""
    verb("fit", out / "fitted.csv", "--out", out / "fit")
    if choose:
        laws = rolling_origin(out / "fitted.csv", work / "laws")
        (out / "laws.json").write_text(json.dumps(laws, indent=1) + "\n")
        best = min(laws, key=lambda law: law["mean"])
        verb("fit", out / "fitted.csv", "--out", out / "law", "--law", best["law"], "--count", best["count"])
    predict(out, "planned.csv", out / "prediction.json")


def predict(out: Path, table: str, found: Path, fit: str = "law") -> dict[str, Any]:
    """The predictions for a table of the report, written to `found`; by fit/ where the report has no law/."""
    folder = out / fit if (out / fit).exists() else out / "fit"
    verb("predict", folder, "--against", out / table, "--extrapolate", "--json", found)
    return json.loads(found.read_text())


def report(out: Path, work: Path, ran: dict[str, Any]) -> None:
    """Compares the predictions with table.csv and writes summary.json: the facts of the runs, and what was found."""
    predict(out, "table.csv", out / "held_out.json")
    work.mkdir(parents=True, exist_ok=True)
    chinchilla = predict(out, "table.csv", work / "chinchilla.json", "fit")
    summary = ran | summarise(out) | {"held_out_chinchilla": chinchilla["unseen"]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["held_out"], indent=1))


def select(table: Path, points: list[Point], out: Path) -> None:
    """Writes the rows of these points alone: the sweep may have others, and what is fitted must not be held out."""
    names = {point.name for point in points}
    with table.open(newline="") as file, out.open("w", newline="") as selected:
        rows = csv.DictReader(file)
        writer = csv.DictWriter(selected, list(rows.fieldnames or ()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if row["name"] in names)


def rolling_origin(table: Path, work: Path) -> list[dict[str, Any]]:
    """How far each law, fitted without the largest budgets of a table, is from the best runs of those that it lacks.

    `errors`: the mean of the relative errors, by the largest FLOPs that were fitted; `mean`: over both.
    """
    with table.open(newline="") as file:
        budgets = sorted({float(row["budget"]) for row in csv.DictReader(file)})
    laws = []
    for law, count in LAWS:
        errors = {}
        for cut in budgets[-3:-1]:
            fit, found = work / f"{law}-{count}-{cut:g}", work / f"{law}-{count}-{cut:g}.json"
            chosen = ("--law", law, "--count", count, "--max-flops", cut)
            verb("fit", table, "--out", fit, *chosen, "--bootstraps", 0)
            verb("predict", fit, "--against", table, "--extrapolate", "--json", found)
            errors[f"{cut:g}"] = json.loads(found.read_text())["unseen"]["best"]["mean_error"]
        laws.append({"law": law, "count": count, "errors": errors, "mean": sum(errors.values()) / len(errors)})
    return laws


def plan(points: list[Point], file: TextIO) -> None:
    """Writes the points as a sweep's table has them, but for what is measured."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("name", "budget", "parameters", "parameters_non_embedding", "tokens", "flops"))
    for point in points:
        counts = point.counts["total"], point.counts["non_embedding"]
        rows.writerow((point.name, point.budget, *counts, point.tokens, point.flops))


def verb(*words: Any) -> None:
    """Runs a verb of gptjax; ends this process as it ended where it failed."""
    done = subprocess.run([sys.executable, "-m", "gptjax", *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)


def summarise(out: Path) -> dict[str, Any]:
    """The held-out runs beside their predictions; ends with an error where a prediction was changed after its runs."""
    compared = json.loads((out / "held_out.json").read_text())
    predicted = {row["name"]: row["predicted"] for row in json.loads((out / "prediction.json").read_text())["rows"]}
    unseen = [row for row in compared["rows"] if not row["fitted"]]
    changed = [row["name"] for row in unseen if row["predicted"] != predicted.get(row["name"])]
    if changed:
        sys.exit(f"the prediction of {changed} is not the one in prediction.json: the fit was changed after it")
    with (out / "table.csv").open() as table:
        bits = {row["name"]: float(row["bits_per_byte"]) for row in csv.DictReader(table)}
    runs = [row | {"bits_per_byte": bits[row["name"]]} for row in unseen]
    return {"held_out": compared["unseen"], "runs": runs}


def seconds(times: Path) -> dict[str, float]:
    """Seconds in which at least one run was going (the ladder's own time), and the sum over all runs.

    No end is noted of a run whose sweep was killed: it counts until its job's next start, else to the last line.
    """
    events = sorted((json.loads(line) for line in times.read_text().splitlines()), key=lambda e: e["time"])
    spans: list[tuple[float, float]] = []
    going: dict[str, float] = {}  # a job runs once at a time
    for event in events:
        if event["job"] in going:
            spans.append((going.pop(event["job"]), event["time"]))
        if event["event"] == "start":
            going[event["job"]] = event["time"]
    spans += [(start, events[-1]["time"]) for start in going.values()]
    busy, until = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"clock": busy, "sum": sum(end - start for start, end in spans)}


if __name__ == "__main__":
    main()

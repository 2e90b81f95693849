"""A ladder of tiny models on real text, from fetching to report: a scaling law, held to runs that it has not seen.

    python benchmarks/scaling_ladder.py --out DIR --until prediction   # writes DIR/fit and DIR/prediction.json: commit
    python benchmarks/scaling_ladder.py --out DIR                      # trains the held-out budgets, compares, reports

The second command alone does all of it; the first stops before anything that is predicted has been trained, so that the
prediction can be published before its runs. Each step is a verb of gptjax and is not done again where it is done: a
killed ladder goes on.

The corpus: ladder_corpus.py (49 MB), prepared with a SentencePiece vocabulary of 2,048. The models: configs/ladder.py.
Budgets are training FLOPs, forward and backward, of the products and of causal attention (gptjax.scaling.counts). Five
budgets over one decade are fitted, with 3 sizes each and 5 in the middle one, all with two seeds; the next half decade,
2 budgets with 3 sizes around the predicted best, is held out. Loss is that of the validation split, in nats a token.

What is compared: the law's prediction of each held-out run and of each budget's best run, and beside it what a straight
line in log loss and log FLOPs through the best runs of the two largest fitted budgets says. Writes fit/ (JSON, report,
plots), prediction.json, held_out.json, table.csv and summary.json.
"""

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from facts import ROOT, facts
from ladder_corpus import write

from gptjax.config import SweepConfig
from gptjax.flags import load_recipe
from gptjax.startup import usable_cores
from gptjax.sweep.points import make_points

RECIPE, VOCAB = ROOT / "configs" / "ladder.py", 2048
FITTED = ("1.2e12:1,2,4@0,1", "2.13e12:1,2,4@0,1", "3.79e12:1,2,3,4,5@0,1", "6.75e12:2,4,5@0,1", "1.2e13:2,4,5@0,1")
HELD_OUT = ("2.13e13:4,5,6", "3.79e13:5,6,7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling_ladder"), help="folder for corpus and runs")
    parser.add_argument("--until", choices=("prediction", "report"), default="report")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="runs at a time, each on its own cores")
    parser.add_argument("--fitted", nargs="+", default=list(FITTED), help="points to fit, as gptjax sweep's --grid")
    parser.add_argument("--held-out", nargs="+", default=list(HELD_OUT), help="points to predict")
    args = parser.parse_args()
    corpus, sweep, fit = args.work / "corpus", args.work / "sweep", args.out / "fit"
    text = args.work / "corpus.jsonl"
    if not text.exists():
        print(write(text))
    verb("prepare", "--source", text, "--out", corpus, "--tokenizer.vocab-size", VOCAB)
    training = ("sweep", RECIPE, "--out", sweep, "--workers", args.workers, "--set", f"data.source={corpus}", "--grid")
    if not (args.out / "prediction.json").exists():
        verb(*training, *args.fitted)
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(sweep / "table.csv", args.out / "fitted.csv")
        verb("fit", args.out / "fitted.csv", "--out", fit)
        planned = args.out / "planned.csv"
        with planned.open("w") as file:
            plan(SweepConfig(out=str(sweep), grid=tuple(args.held_out), set=(f"data.source={corpus}",)), file)
        verb("predict", fit, "--against", planned, "--extrapolate", "--json", args.out / "prediction.json")
    if args.until == "prediction":
        return
    verb(*training, *args.fitted, *args.held_out)
    shutil.copy(sweep / "table.csv", args.out / "table.csv")
    verb("predict", fit, "--against", args.out / "table.csv", "--extrapolate", "--json", args.out / "held_out.json")
    summary = summarise(args.out, sweep)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["held_out"], indent=1))


def plan(cfg: SweepConfig, file: TextIO) -> None:
    """Writes the points that a sweep of these settings would train, as its table has them, but for what is measured."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("name", "budget", "parameters", "tokens", "flops"))
    for point in make_points(cfg, load_recipe(str(RECIPE))):
        rows.writerow((point.name, point.budget, point.counts["total"], point.tokens, point.flops))


def verb(*words: Any) -> None:
    """Runs a verb of gptjax; ends this process as it ended where it failed."""
    done = subprocess.run([sys.executable, "-m", "gptjax.cli", *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)


def summarise(out: Path, sweep: Path) -> dict[str, Any]:
    """What the report says, with the seconds that the runs took and the facts of this machine."""
    compared = json.loads((out / "held_out.json").read_text())
    predicted = {row["name"]: row["predicted"] for row in json.loads((out / "prediction.json").read_text())["rows"]}
    unseen = [row for row in compared["rows"] if not row["fitted"]]
    changed = [row["name"] for row in unseen if row["predicted"] != predicted[row["name"]]]
    if changed:
        sys.exit(f"the prediction of {changed} is not the one in prediction.json: the fit was changed after it")
    with (out / "table.csv").open() as table:
        bits = {row["name"]: float(row["bits_per_byte"]) for row in csv.DictReader(table)}
    return facts(f"{usable_cores()} CPU cores", "jax", "numpy") | {
        "seconds_of_runs": seconds(sweep / "times.jsonl"),
        "held_out": compared["unseen"],
        "runs": [row | {"bits_per_byte": bits[row["name"]]} for row in unseen],
    }


def seconds(times: Path) -> dict[str, float]:
    """Seconds in which at least one run was going (the ladder's own time), and the sum over all runs."""
    events = [json.loads(line) for line in times.read_text().splitlines()]
    going: dict[tuple[str, int], float] = {}
    busy, total, since = 0.0, 0.0, math.inf
    for event in sorted(events, key=lambda e: e["time"]):
        key = event["job"], event["process"]
        if event["event"] == "start":
            since = since if going else event["time"]
            going[key] = event["time"]
        elif key in going:
            total += event["time"] - going.pop(key)
            if not going:
                busy += event["time"] - since
    return {"clock": busy, "sum": total}


if __name__ == "__main__":
    main()

"""Reward against KL: the frontier of policies at several betas beside best-of-n, and a proxy that is over-optimised.

    gptjax pretrain quickstart
    python benchmarks/kl_frontier.py runs/quickstart --work DIR --out benchmarks/results --plots docs/assets

The frontier: the recipe's ppo() from the run, once for each beta, measured on its held-out prompts; best of 2, 4 and
16 of the run's own answers beside it, at log n - (n - 1) / n nats an answer, which is no less than its KL (Beirami et
al. 2024).

Over-optimisation: the same policy trained on a proxy, which is a ridge regression of the recipe's reward (the gold) on
counts of 1 to 3 letters in a row, fitted on --labels answers of the run. The gold is a source of weight 1e-6: measured,
and not trained on.

Runs that are finished in --work are taken as they are, and others go on where they were.
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from best_of_n import best_of_n, draw_answers
from report import facts, processor, write_report

import gptjax
from gptjax.config.plugins import register
from gptjax.runtime.process import tune_process

BUCKETS = 4096  # of hashed letters in a row
NAMES = ("eval_reward", "eval_reward_stderr", "eval_kl", "eval_kl_k3", "eval_length")
WEIGHTS: dict[str, np.ndarray] = {}


def letters(texts: list[str]) -> np.ndarray:
    """Square roots of the counts of 1 to 3 letters in a row in each text, hashed, and a constant."""
    x = np.zeros((len(texts), BUCKETS + 1))
    for row, text in enumerate(texts):
        for n in (1, 2, 3):
            for start in range(len(text) - n + 1):
                x[row, zlib.crc32(text[start : start + n].encode()) % BUCKETS] += 1
    x[:, -1] = 1
    return np.sqrt(x)


def proxy(prompts: list, answers: list[str]) -> list[float]:
    """The reward that the regression in WEIGHTS predicts."""
    del prompts
    return (letters(answers) @ WEIGHTS["proxy"]).tolist()


def fit_proxy(texts: list[str], gold: np.ndarray, labels: int) -> dict[str, float]:
    """Fits the proxy on the first `labels` texts, the ridge chosen on a fifth of them; its numbers on the others."""
    x, y = letters(texts), gold.astype(np.float64)

    def solve(rows: slice, ridge: float) -> np.ndarray:
        inside = x[rows] @ x[rows].T + ridge * np.eye(len(x[rows]))
        return x[rows].T @ np.linalg.solve(inside, y[rows])

    part = labels * 4 // 5
    errors = {r: np.square(x[part:labels] @ solve(slice(part), r) - y[part:labels]).mean() for r in (1, 3, 10, 30, 100)}
    ridge = min(errors, key=errors.__getitem__)
    WEIGHTS["proxy"] = solve(slice(labels), ridge)
    others = slice(labels, len(texts))
    correlation = np.corrcoef(x[others] @ WEIGHTS["proxy"], y[others])[0, 1]
    return {"labels": labels, "ridge": ridge, "correlation": float(correlation), "answers": len(texts) - labels}


def trained(base: str, folder: Path, more: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of the recipe's policy, trained with other settings from the base; it goes on if it was begun."""
    config = gptjax.recipe(
        "quickstart", {"init": base, "run_dir": str(folder), "sinks": (), "model.dtype": "float32"} | more, stage="ppo"
    )
    metrics = folder / "metrics.jsonl"

    def evaluations() -> list[dict[str, Any]]:
        lines = map(json.loads, metrics.read_text().splitlines() if metrics.exists() else ())
        return [line for line in lines if "eval_loss" in line]

    if config.steps not in [line["step"] for line in evaluations()]:
        gptjax.train(config)
    return evaluations()


def plot(report: dict[str, Any], folder: Path) -> None:
    """Writes kl_frontier.svg and overoptimisation.svg."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "gptjax", "font.size": 9}

    def save(figure: Figure, name: str) -> None:
        figure.savefig(folder / name, format="svg", metadata={"Date": None})

    best, figure = report["best_of_n"], Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot(xlabel="KL to the reference, nats an answer", ylabel="held-out reward")
    points = [best[f"best_of_{n}"] for n in (2, 4, 16)]
    x, y = [0, *(p["kl"] for p in points)], [best["chance"], *(p["reward"] for p in points)]
    axes.plot(x, y, "s--", color="0.45", label="best of n, at a bound of its KL")
    for n, p in zip((2, 4, 16), points):
        axes.annotate(f"{n}", (p["kl"], p["reward"]), (8, -4), textcoords="offset points")
    ends = [runs["evaluations"][-1] for runs in report["frontier"]]
    for run, color in zip(report["frontier"], ("C0", "C1", "C2", "C3", "C4", "C5")):
        names = "eval_kl", "eval_reward", "eval_reward_stderr"
        x, y, e = ([line[name] for line in run["evaluations"]] for name in names)
        axes.plot(x, y, ".-", color=color, alpha=0.35)
        axes.errorbar(x[-1], y[-1], e[-1], fmt="o", color=color, capsize=3, label=f"beta {run['beta']:g}")
    axes.plot([line["eval_kl"] for line in ends], [line["eval_reward"] for line in ends], "-", color="0.2", zorder=0)
    axes.legend(loc="lower right")
    save(figure, "kl_frontier.svg")

    run, figure = report["proxy"], Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="KL to the reference, nats an answer", ylabel="held-out reward")
    lines = run["evaluations"]
    for name, label in (("proxy", "proxy, trained on"), ("gold", "gold")):
        axes.plot(
            [line["eval_kl"] for line in lines], [line[f"eval_reward_{name}"] for line in lines], "o-", label=label
        )
    axes.legend(loc="upper left")
    save(figure, "overoptimisation.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a finished run of gptjax pretrain quickstart")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plots", type=Path, help="folder for plots; needs matplotlib")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--labels", type=int, default=400)
    parser.add_argument("--proxy-steps", type=int, default=24)
    parser.add_argument("--proxy-beta", type=float, default=0.01)
    parser.add_argument("--proxy-rate", type=float, default=2e-4)
    args = parser.parse_args()
    tune_process()
    args.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = facts(processor(), "jax", "jaxlib") | {"steps": args.steps}

    report["best_of_n"] = best_of_n(args.base, "quickstart")
    report["frontier"] = []
    for beta in args.betas:
        found = trained(args.base, args.work / f"beta_{beta:g}", {"beta": beta, "steps": args.steps})
        lines = [{name: line[name] for name in ("step", *NAMES)} for line in found]
        report["frontier"].append({"beta": beta, "evaluations": lines})
        print(json.dumps({"beta": beta} | lines[-1]), flush=True)

    (gold,) = gptjax.recipe("quickstart", {"init": args.base}, stage="grpo").rewards.sources  # pyright: ignore
    texts, gold_PS = draw_answers(args.base, "quickstart", 2, held=False)
    run: dict[str, Any] = fit_proxy(texts, gold_PS.ravel(), args.labels)
    run |= {"beta": args.proxy_beta, "learning_rate": args.proxy_rate}
    sources = {"rewards.sources": (f"proxy={register(proxy)}", f"gold={gold}"), "rewards.weights": (1.0, 1e-6)}
    more = {"beta": args.proxy_beta, "steps": args.proxy_steps, "optim.learning_rate": args.proxy_rate}
    more |= {"optim.schedule": "constant", "evaluate.every": max(1, args.proxy_steps // 8)}
    found = trained(args.base, args.work / "proxy", sources | more)
    names = ("step", "eval_reward_proxy", "eval_reward_gold", "eval_kl", "eval_length")
    texts, gold_PS = draw_answers(args.base, "quickstart", 16)
    before = float(np.mean(proxy([], texts))), float(gold_PS.mean())
    start = {"step": 0, "eval_kl": 0.0, "eval_reward_proxy": before[0], "eval_reward_gold": before[1]}
    run["evaluations"] = [start, *({name: line[name] for name in names} for line in found)]
    report["proxy"] = run
    for line in run["evaluations"]:
        print(json.dumps(line))
    print(f"wrote {write_report(report, args.out, 'kl_frontier')}")
    if args.plots:
        plot(report, args.plots)


if __name__ == "__main__":
    main()

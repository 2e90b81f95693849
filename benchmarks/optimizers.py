"""Optimizers on the quickstart at equal steps: what each reaches at the best of a few learning rates, and its state.

    python benchmarks/optimizers.py --steps 200 --out benchmarks/results

Each run is `gptjax pretrain configs/quickstart.py` with the optimizer, its learning rate, and the schedule fitted to
these steps: a warm-up of a tenth of them, then half a cosine to 0. All else is the recipe's, the seed and so the order
of the data too. The training loss is the mean of the last 20 steps, the evaluation's that of the whole validation
split; the best learning rate is the one of lowest evaluation loss, and a best that is the first or the last of its list
is marked: another might do better. Seconds of a step depend on what else the machine does. Bytes of state a device are
counted from the shardings on a mesh of fsdp=4 x tensor=2, in float32.

Writes DATE_optimizers.json, .md and .png (which takes matplotlib: pip install 'gptjax[plots]').
"""

import argparse
import json
import math
import platform
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from report import ROOT, facts, write_report

from gptjax.config import OptimConfig
from gptjax.model.decoder import init_params, make_decoder
from gptjax.parallel.sharding import AXES, shardings
from gptjax.training.optim import make_optimizer, make_schedule

RECIPE = ROOT / "configs" / "quickstart.py"
# Lion's steps have the size of the learning rate in every element, AdamW's are two to five times smaller.
LEARNING_RATES = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "muon": (1e-3, 2e-3, 4e-3),
    "adafactor": (1e-3, 2e-3),
    "lion": (2e-4, 4e-4),
}
TAIL = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--kinds", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    args = parser.parse_args()
    if args.steps < TAIL:
        parser.error(f"--steps {args.steps}: wanted at least {TAIL}, whose losses are averaged")

    device = f"{platform.machine()} {jax.default_backend()}, {jax.device_count()} device(s)"
    report = facts(device, "jax", "flax", "optax") | {
        "recipe": RECIPE.relative_to(ROOT).as_posix(),
        "steps": args.steps,
    }
    report["state_bytes"] = {kind: state_bytes(kind) for kind in args.kinds}
    with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as folder:
        corpus = prepare(Path(folder))
        report["runs"] = [
            train(Path(folder), corpus, kind, rate, args.steps) for kind in args.kinds for rate in LEARNING_RATES[kind]
        ]
    report["best"] = {kind: best(report["runs"], kind) for kind in args.kinds}

    path = write_report(report, args.out, "optimizers")
    path.with_suffix(".md").write_text(table(report))
    plot(report, path.with_suffix(".png"))
    print(table(report))
    print(f"wrote {path}, .md and .png")


def gptjax(verb: str, *options: str) -> None:
    """Runs a verb of the command line; ends with what it wrote to stderr where it fails."""
    done = subprocess.run([sys.executable, "-m", "gptjax", verb, *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gptjax {verb} {shlex.join(options)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def prepare(folder: Path) -> Path:
    """The recipe's corpus, prepared once: by a run of one step, which also fills the cache of compiled programs."""
    gptjax("pretrain", str(RECIPE), "--run-dir", str(folder / "first"), "--steps", "1", "--evaluate.max-rows", "8")
    return folder / "first" / "data"


def train(folder: Path, corpus: Path, kind: str, rate: float, steps: int) -> dict[str, Any]:
    """One run: its losses, and the loss on the whole validation split."""
    run, began = folder / f"{kind}_{rate:g}", time.perf_counter()
    settings = {
        "run-dir": run, "steps": steps, "data.source": corpus, "evaluate.every": steps, "checkpoint.every": steps,
        "optim.kind": kind, "optim.learning-rate": rate, "optim.warmup-steps": steps // 10,
    }  # fmt: skip
    gptjax("pretrain", str(RECIPE), *(str(part) for name, value in settings.items() for part in (f"--{name}", value)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluation = next(line for line in reversed(lines) if "eval_loss" in line)
    steps_of = [line for line in lines if "tokens_per_second" in line and "loss" in line]
    losses = [line["loss"] for line in steps_of]
    tokens = statistics.median(line["tokens_per_second"] for line in steps_of[10:])
    result = {
        "kind": kind, "learning_rate": rate, "loss": statistics.mean(losses[-TAIL:]),
        "eval_loss": evaluation["eval_loss"], "eval_bits_per_byte": evaluation["eval_bits_per_byte"],
        "median_tokens_per_second": tokens, "seconds": round(time.perf_counter() - began, 1), "losses": losses,
    }  # fmt: skip
    print(f"{kind} {rate:g}: loss {result['loss']:.3f}, evaluation {result['eval_loss']:.3f}, {tokens:,.0f} tokens/s, "
          f"{result['seconds']:.0f} s", flush=True)  # fmt: skip
    return result


def best(runs: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The learning rate of lowest evaluation loss, and whether it lies at an end of its list."""
    run = min((r for r in runs if r["kind"] == kind), key=lambda r: r["eval_loss"])
    rates = LEARNING_RATES[kind]
    return {name: run[name] for name in ("learning_rate", "loss", "eval_loss", "eval_bits_per_byte")} | {
        "at_the_end_of_its_list": run["learning_rate"] in (rates[0], rates[-1])
    }


def state_bytes(kind: str) -> dict[str, int]:
    """Bytes of the optimizer's state on one device, alone and on fsdp=4 x tensor=2; Adafactor's also bare."""
    config = runpy.run_path(str(RECIPE))["pretrain"]()
    params = jax.eval_shape(init_params(make_decoder(config)), jax.random.key(0))

    def held(tree: Any, **sizes: int) -> int:
        mesh = AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
        where = shardings(tree, mesh)  # pyright: ignore[reportArgumentType]
        parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, where)
        return sum(jax.tree.leaves(parts))

    def state(**settings: Any) -> Any:
        cfg = OptimConfig(kind=kind, **settings)  # pyright: ignore[reportArgumentType]
        return jax.eval_shape(make_optimizer(cfg, make_schedule(cfg, 1)).init, params)

    result = {
        "parameters": held(params),
        "one_device": held(state()),
        "fsdp_4_tensor_2": held(state(), fsdp=4, tensor=2),
    }
    if kind == "adafactor":
        bare = state(beta1=0.0)
        result |= {"one_device_beta1_0": held(bare), "fsdp_4_tensor_2_beta1_0": held(bare, fsdp=4, tensor=2)}
    return result


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, the best run of each kind first."""
    lines = [
        f"# Optimizers at {report['steps']} steps of {report['recipe']}, {report['date']}",
        "",
        f"`{report['command']}`, commit {report['commit']}, {report['device']}, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        "",
        f"Loss is the mean of the last {TAIL} steps, in nats a token; MB of state are 10^6 bytes a device.",
        "",
        "| optimizer | best learning rate | loss | evaluation | bits per byte | state, 1 device | fsdp=4 tensor=2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, b in sorted(report["best"].items(), key=lambda item: item[1]["eval_loss"]):
        one, eight = (report["state_bytes"][kind][mesh] / 1e6 for mesh in ("one_device", "fsdp_4_tensor_2"))
        end = " (end of the list)" if b["at_the_end_of_its_list"] else ""
        lines.append(
            f"| {kind} | {b['learning_rate']:g}{end} | {b['loss']:.3f} | {b['eval_loss']:.3f} | "
            f"{b['eval_bits_per_byte']:.3f} | {one:.2f} MB | {eight:.2f} MB |"
        )
    if "adafactor" in report["state_bytes"]:
        size = report["state_bytes"]["adafactor"]
        one, eight = (size[f"{mesh}_beta1_0"] / 1e6 for mesh in ("one_device", "fsdp_4_tensor_2"))
        lines += ["", f"Adafactor without a first moment (--optim.beta1 0) holds {one:.2f} MB on one device and "
                  f"{eight:.2f} MB on each of eight."]  # fmt: skip
    lines += ["", "| optimizer | learning rate | loss | evaluation | tokens/s |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['kind']} | {r['learning_rate']:g} | {r['loss']:.3f} | {r['eval_loss']:.3f} | "
        f"{r['median_tokens_per_second']:,.0f} |"
        for r in report["runs"]
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Training loss by step, averaged over 10 steps, of each kind at its best learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for run in report["runs"]:
        if run["learning_rate"] == report["best"][run["kind"]]["learning_rate"]:
            smooth = np.convolve(run["losses"], np.ones(10) / 10, "valid")
            axes.plot(range(10, len(smooth) + 10), smooth, label=f"{run['kind']}, {run['learning_rate']:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token, mean of 10 steps")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""How soon training starts: --help, imports, the first step of the quickstart, and compiling the training step.

    python benchmarks/compile_time.py --out benchmarks/results

Every number is wall seconds of a process of its own, from its start. `help` is `gptjax --help`; `import` is what
`import gptjax.training.loop, gptjax.model.decoder` adds to `import jax`, in the same round. A start is
`gptjax pretrain quickstart` until metrics.jsonl has the first line of that process, which is then told to stop and
saves the run: cold with an empty cache folder (XDG_CACHE_HOME), warm with the same cache folder in a new run folder,
resumed in the run folder of the warm one; warm and resumed are also given as shares of the cold one of their round.
`compile` is tracing, lowering and
XLA's compilation of a recipe's training step with no cache, layers scanned and unrolled; the batch is cut to one row.
Medians, with 5th and 95th percentiles.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import ROOT, facts, spread, write_report

PRETRAIN = [sys.executable, "-m", "gptjax", "pretrain"]
KINDS = ("cold", "warm", "resumed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", default="quickstart", help="recipe whose start is timed")
    parser.add_argument("--recipe", default="gpt2", help="recipe whose step is compiled; empty: none")
    parser.add_argument("--compile-one", default="", help=argparse.SUPPRESS)  # scanned or unrolled, in this process
    args = parser.parse_args()
    if args.compile_one:
        print(json.dumps(compile_seconds(args.recipe, args.compile_one == "unrolled")))
        return
    report = measure(args)
    path = write_report(report, args.out, "compile_time")
    print(table(report))
    print(f"wrote {path}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report: rounds, each with every kind of number, so that ratios are of one moment."""
    help_command = [sys.executable, "-m", "gptjax", "--help"]
    plain, ours = (
        [sys.executable, "-c", f"import jax{more}"] for more in ("", ", gptjax.training.loop, gptjax.model.decoder")
    )
    seconds: dict[str, list[float]] = {}
    for command in (help_command, plain, ours):
        timed(command)  # Python's own caches are filled, and the files read once
    for _ in range(args.rounds):
        jax_alone = timed(plain)
        found = {"help": timed(help_command), "import jax": jax_alone, "import gptjax adds": timed(ours) - jax_alone}
        found |= starts(args.start)
        found |= {f"{kind} / cold": found[kind] / found["cold"] for kind in KINDS[1:]}
        for name, value in found.items():
            seconds.setdefault(name, []).append(value)
    compiled = {}
    for layers in ("scanned", "unrolled") if args.recipe else ():
        command = [sys.executable, __file__, "--out", ".", "--recipe", args.recipe, "--compile-one", layers]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"compiling {args.recipe} failed:\n{done.stderr}")
        compiled[layers] = json.loads(done.stdout)
    device = {"platform": os.environ.get("JAX_PLATFORMS", ""), "cores": os.cpu_count(), "load_before": LOAD}
    return facts(device, "jax", "jaxlib", "flax") | {
        "start": args.start,
        "rounds": args.rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "recipe": args.recipe,
        "compile_seconds": compiled,
    }


def starts(recipe: str) -> dict[str, float]:
    """Seconds to the first step: with an empty cache, with that cache in a new folder, and resumed in that folder."""
    with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as folder:
        cache, runs = Path(folder) / "cache", [Path(folder) / name for name in ("first", "second", "second")]
        return {kind: first_line(recipe, run, cache) for kind, run in zip(KINDS, runs, strict=True)}


def first_line(recipe: str, run: Path, cache: Path) -> float:
    """Seconds until a start writes its first line of metrics; then it is told to stop, which saves the run."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        command = [*PRETRAIN, recipe, "--run-dir", str(run)]
        process = subprocess.Popen(command, env=environment(cache), stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before):
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        process.terminate()
        if process.wait() != 75:
            errors.seek(0)
            raise SystemExit(f"{recipe} ended with code {process.returncode}:\n{errors.read()}")
    return seconds


def compile_seconds(name: str, unrolled: bool) -> dict[str, float]:
    """Seconds to trace, lower and compile a recipe's training step on one row, in this process."""
    import jax

    from gptjax.config.command_line import load_recipe
    from gptjax.data.packing import example_batch
    from gptjax.parallel.sharding import abstract, make_mesh
    from gptjax.training.build import build_components
    from gptjax.training.step import compile_step

    config = load_recipe(name).config("pretrain", "")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, unroll=0 if unrolled else 1),
        data=dataclasses.replace(config.data, batch_size=1),
        optim=dataclasses.replace(config.optim, accumulate=1),
    )
    mesh, parts = make_mesh(config.mesh, jax.devices()[:1]), build_components(config)
    batch = example_batch(1, config.data.length)
    with jax.set_mesh(mesh):
        state = abstract(jax.eval_shape(parts.init, 0), mesh)
        start = time.perf_counter()
        lowered = compile_step(parts.step, mesh, state, {}, batch).lower(state, {}, batch)
        traced = time.perf_counter() - start
        lowered.compile()
    return {"trace and lower": round(traced, 3), "compile": round(time.perf_counter() - start - traced, 3)}


def timed(command: list[str]) -> float:
    """Seconds of a command, which must succeed."""
    start = time.perf_counter()
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def environment(cache: Path | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path} | ({"XDG_CACHE_HOME": str(cache)} if cache else {})


def table(report: dict[str, Any]) -> str:
    lines = ["| | p5 | median | p95 |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {x['p5']:.3f} | {x['median']:.3f} | {x['p95']:.3f} |" for name, x in report["seconds"].items()
    ]
    for layers, x in report["compile_seconds"].items():
        lines.append(f"{report['recipe']}, layers {layers}: " + ", ".join(f"{k} {v:.1f} s" for k, v in x.items()))
    return "\n".join(lines)


LOAD = [round(load, 2) for load in os.getloadavg()]

if __name__ == "__main__":
    main()

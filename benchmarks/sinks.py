"""Cost of a broken sink: the quickstart's steps without sinks, with TensorBoard, with one that blocks, one that raises.

    python benchmarks/sinks.py --out benchmarks/results  # about 4 minutes where the quickstart takes 5

All runs train from the same weights on the same rows in this process and take turns, a step at a time and in an order
that is drawn anew each time, so that whatever else the machine does falls on all alike. A step is timed from its start
until its line is written, every line goes to the sinks, and losses must be equal, bit for bit. Ratios are of medians;
each comes with its 95 % interval, over steps drawn again (bootstrap). `report` is the part of a step that writes its
line and gives it to the sinks, in milliseconds.
"""

import argparse
import dataclasses
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from report import facts, spread, write_report

from gptjax.api import recipe
from gptjax.config.plugins import register
from gptjax.data.packing import example_batch
from gptjax.parallel.sharding import make_mesh, to_global
from gptjax.stages.runner import resolve_dtype
from gptjax.training.build import build_components
from gptjax.training.metrics import Metrics
from gptjax.training.step import compile_step, init_state

WARM_UP, REDRAWN = 10, 2000


class Raising:
    """A sink that fails at every line."""

    def start(self, run: Path, settings: Any, resumed_step: int) -> None: ...

    def scalars(self, step: int, values: Any) -> None:
        raise OSError("no space left")

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class Blocking(Raising):
    """A sink that never comes back."""

    def scalars(self, step: int, values: Any) -> None:
        threading.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the quickstart")
    args = parser.parse_args()
    kinds = {"none": (), "tensorboard": ("tensorboard",), "blocking": (register(Blocking),),
             "raising": (register(Raising),)}  # fmt: skip
    seconds, reports, losses = measure(kinds, args.steps, dict(pair.split("=", 1) for pair in args.set))
    equal = all(np.array_equal(losses[kind], losses["none"]) for kind in kinds)
    report = facts({"platform": jax.default_backend(), "cpu": cpu()}, "jax", "jaxlib") | {
        "steps": args.steps, "losses_equal": equal,
        "milliseconds": {kind: spread([1000 * s for s in of]) for kind, of in seconds.items()},
        "report": {kind: spread([1000 * s for s in of]) for kind, of in reports.items()},
        "over_none": {kind: ratio(of, seconds["none"]) for kind, of in seconds.items() if kind != "none"},
    }  # fmt: skip
    print(f"none         median step {report['milliseconds']['none']['median']:.2f} ms")
    for kind, of in report["over_none"].items():
        print(
            f"{kind:12} median step {report['milliseconds'][kind]['median']:.2f} ms, {of['ratio']:.4f} of none's, "
            f"95 % interval {of['low']:.4f} to {of['high']:.4f}; "
            f"report {report['report'][kind]['median']:.3f} ms, none's {report['report']['none']['median']:.3f}"
        )
    print(f"losses are {'equal' if equal else 'NOT equal'}; wrote {write_report(report, args.out, 'sinks')}")
    return 0 if equal else 1


def measure(kinds: dict[str, tuple[str, ...]], steps: int, settings: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Seconds of each kind's steps and of their reports, the first WARM_UP left out, and the losses."""
    given = {name: int(value) for name, value in settings.items()} | {"steps": steps + WARM_UP, "log_every": 1}
    cfg, _ = resolve_dtype(recipe("quickstart", given))
    mesh = make_mesh(cfg.mesh)
    decoder, _, init, step = build_components(cfg)
    rng = np.random.default_rng(0)
    seconds, reported, losses = ({kind: [] for kind in kinds} for _ in range(3))
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        states = {kind: init_state(init, cfg.seed, mesh) for kind in kinds}
        rows = dict(example_batch(cfg.data.batch_size, cfg.data.length))
        rows |= {"weights_BL": np.ones_like(rows["weights_BL"]), "segments_BL": np.ones_like(rows["segments_BL"])}
        rows["positions_BL"] = np.broadcast_to(np.arange(cfg.data.length, dtype=np.int32), rows["inputs_BL"].shape)
        train = compile_step(step, mesh, states["none"], {}, rows)
        reports = {}
        for kind, sinks in kinds.items():
            (Path(folder) / kind).mkdir()
            with_sinks = dataclasses.replace(cfg, sinks=sinks)
            reports[kind] = Metrics(Path(folder) / kind / "metrics.jsonl", with_sinks, decoder.vocab_size)
        for i in range(1, cfg.steps + 1):
            text_BL = rng.integers(4, decoder.vocab_size, rows["inputs_BL"].shape, np.int32)
            batch = to_global({**rows, "inputs_BL": text_BL, "targets_BL": np.roll(text_BL, -1, 1)}, mesh, None)
            for kind in rng.permutation(list(kinds)):
                begin = time.perf_counter()
                states[kind], values = train(states[kind], {}, batch)
                values = jax.device_get(values)
                trained = time.perf_counter()
                reports[kind].log_step(i, values)
                if i > WARM_UP:
                    seconds[kind].append(time.perf_counter() - begin)
                    reported[kind].append(time.perf_counter() - trained)
                losses[kind].append(float(values["loss"]))
        for report in reports.values():
            report.close()
    return seconds, reported, losses


def ratio(of: list[float], base: list[float]) -> dict[str, float]:
    """The ratio of medians, with its 95 % interval over steps that are drawn again in pairs."""
    a, b = np.array(of), np.array(base)
    drawn = np.random.default_rng(0).integers(0, len(a), (REDRAWN, len(a)))
    low, high = np.percentile(np.median(a[drawn], 1) / np.median(b[drawn], 1), [2.5, 97.5])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    raise SystemExit(main())

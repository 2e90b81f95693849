"""The speed at which rows are made for training, and the share of its time that the quickstart waits for them.

    python benchmarks/input.py --out benchmarks/results --text FOLDER --tokenizer MODEL

Rates are 10^6 predictions (rows x length) a second. `rows` are the batches of a prepared corpus in training's own
shuffled order, by the thread that makes them in training, the process bound to one core: with the pages of the corpus
in the cache of decoded pages, as they are after a while where they fit (64 MiB), and with a cache of 8 pages, so that
almost every page is read from its file (which the system may hold in memory) and decoded. `streams` are text read,
tokenised and packed by so many worker processes (0: a thread of this one), after 20 batches. `waits` is the share of
the quickstart's time that its steps waited for their batch: input_seconds of metrics.jsonl over the time between its
lines, the first 10 steps left out. Medians of the rounds, with 5th and 95th percentiles; every round measures
everything once.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import ROOT, facts, spread, write_report

from gptjax.config import DataConfig, PrepareConfig, TokenizerConfig, TrainConfig
from gptjax.data import corpus
from gptjax.data.pipeline import open_pipeline
from gptjax.data.prepare import prepare
from gptjax.data.rate import rate, rows_rate

LENGTHS = (128, 256, 1024)
WORKERS = (0, 1, 2)
BUILT_IN = "builtin:shakespeare"
FIRST_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--text", default=BUILT_IN, help="a source of text besides the built-in one")
    parser.add_argument("--tokenizer", default="", help="a SentencePiece model; else one of 4,096 ids is trained")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--steps", type=int, default=60, help="of the quickstart; 0: it is left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as folder:
        report = measure(args, Path(folder))
    path = write_report(report, args.out, "input")
    print(table(report))
    print(f"wrote {path}")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report; the text is prepared, and the tokenizer trained where none is given, before anything is timed."""
    tokenizer = TokenizerConfig(vocab_size=4096)
    if args.tokenizer:
        from gptjax.tokenizer import open_tokenizer

        size = open_tokenizer(Path(args.tokenizer)).vocab_size
        tokenizer = TokenizerConfig(vocab_size=size, path=args.tokenizer)
    made = prepare(PrepareConfig(source=args.text, out=str(folder / "corpus"), tokenizer=tokenizer))
    tokenizer = TokenizerConfig(vocab_size=made.vocab_size, path=str(folder / "corpus"))
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, value in round_of(args, folder / "corpus", tokenizer):
            found.setdefault(name, []).append(value)
    device = {"cores": os.cpu_count(), "load_before": LOAD}
    return facts(device, "numpy", "sentencepiece", "array-record", "jax") | {
        "text": args.text,
        "corpus_tokens": made.split("train").num_tokens,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "results": {name: spread(values) for name, values in found.items()},
    }


def round_of(args: argparse.Namespace, folder: Path, tokenizer: TokenizerConfig) -> Iterator[tuple[str, float]]:
    """Yields (what was measured, million tokens a second or share)."""
    for length in LENGTHS:
        data = DataConfig(batch_size=args.batch_size, length=length)
        for pages, kept in (("cached", corpus.CACHE_BYTES), ("read", 0)):
            yield f"rows of {length}, pages {pages}", bound_rows_rate(folder, data, kept, args.seconds)
    for source in dict.fromkeys((BUILT_IN, args.text)):
        for workers in WORKERS:
            data = DataConfig(source=source, batch_size=args.batch_size, length=256, loading="stream", workers=workers)
            config = TrainConfig(tokenizer=tokenizer, data=data)
            yield f"streams of {source}, workers {workers}", stream_rate(config, args.seconds)
    if args.steps:
        yield "waits of the quickstart", quickstart_wait(args.steps)


def bound_rows_rate(folder: Path, data: DataConfig, cache_bytes: int, seconds: float) -> float:
    """Million tokens a second of one core that makes batches, the pages of the corpus read before where they fit."""
    cores, corpus.CACHE_BYTES, before = os.sched_getaffinity(0), cache_bytes, corpus.CACHE_BYTES
    try:
        os.sched_setaffinity(0, {min(cores)})
        return rows_rate(folder, data, seconds) / 1e6
    finally:
        os.sched_setaffinity(0, cores)
        corpus.CACHE_BYTES = before


def stream_rate(config: TrainConfig, seconds: float) -> float:
    """Million tokens a second of a stream."""
    pipeline = open_pipeline(config, Path())
    with contextlib.closing(pipeline.batches(pipeline.start)) as batches:
        return rate(batches, config.data, seconds) / 1e6


def quickstart_wait(steps: int) -> float:
    """The share of the time between the quickstart's steps in which they waited for their batch."""
    with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as folder:
        command = [sys.executable, "-m", "gptjax", "pretrain", "quickstart", "--run-dir", folder]
        command += ["--steps", str(steps), "--evaluate.max-rows", "8", "--generate.max-new-tokens", "1"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the quickstart ended with code {done.returncode}:\n{done.stderr}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line][FIRST_STEPS - 1 :]
    waited = sum(line["input_seconds"] for line in lines[1:])
    return waited / (lines[-1]["seconds"] - lines[0]["seconds"])


def table(report: dict[str, Any]) -> str:
    lines = ["| million tokens/s | p5 | median | p95 |", "|---|---|---|---|"]
    for name, x in report["results"].items():
        factor, unit = (100, " %") if name.startswith("waits") else (1, "")
        values = " | ".join(f"{factor * x[at]:.3f}{unit}" for at in ("p5", "median", "p95"))
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


LOAD = [round(load, 2) for load in os.getloadavg()]

if __name__ == "__main__":
    main()

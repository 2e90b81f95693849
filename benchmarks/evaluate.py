"""`gptjax eval --tasks` on real questions and texts: the numbers of a run, its seconds, and what sharing saves.

    gptjax import SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2
    python benchmarks/evaluate.py runs/smollm2 --data DIR --out DIR             # 1,900 items, sized for 2 cores
    python benchmarks/evaluate.py runs/smollm2 --data DIR --out DIR --limit 50  # a look

DIR of --data holds mmlu_1000.jsonl and wikipedia_1000_passages.jsonl (of PyPI's evals) and bigbench_mc.jsonl.gz (of
bigbench), whose items have input, choices and answer. Asked are MMLU (1,000 questions, their choices as full texts),
bits per byte (300 passages) and a family of BIG-bench (200 questions) with 0, 1 and 4 examples. The first 200 of MMLU
are scored again with nothing shared: the choices must be the same, log-probabilities within 1e-3, and the ratio of the
seconds is what sharing saves, compilation left out of both.

Writes DATE_evaluate.json and, for each task, what came of every item (NAME.jsonl, the texts that were scored in it, for
a peer to score), and the heads of the tasks (tasks/NAME.json), which `gptjax eval --tasks` takes.
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import facts, processor, write_report

from gptjax.config import MeshConfig
from gptjax.evals.measure import TaskResult, measure
from gptjax.evals.report import results_json, table, write_records
from gptjax.evals.requests import encode_pairs
from gptjax.evals.score import Scorer
from gptjax.evals.tasks import load_task
from gptjax.runs.load import load_model
from gptjax.runtime.process import tune_process

MMLU = {"kind": "multiple_choice", "items": "mmlu_1000.jsonl", "prompt": "Question: {input}\nAnswer:", "gold": "answer"}
WIKIPEDIA = {"kind": "text", "items": "wikipedia_1000_passages.jsonl"}
BIGBENCH = {
    "kind": "multiple_choice", "items": "bigbench_mc.jsonl.gz", "where": ["task=date_understanding"],
    "prompt": "Q: {input}\nA:", "gold": "answer",
}  # fmt: skip
TASKS: dict[str, tuple[dict[str, Any], int]] = {
    "mmlu": (MMLU, 1000),
    "wikipedia": (WIKIPEDIA, 300),
    **{f"bigbench_k{k}": (BIGBENCH | {"shots": k}, 200) for k in (0, 1, 4)},
}
AGAIN = 200  # items that are scored with and without sharing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=int, default=10**9, help="items of each task at the most")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    args = parser.parse_args()
    tune_process()
    heads = args.out / "tasks"
    heads.mkdir(parents=True, exist_ok=True)
    model = load_model(args.run, MeshConfig())
    settings = {"batch_tokens": args.batch_tokens}
    scorer = Scorer(model.decoder, model.params, model.mesh, **settings)
    results: list[TaskResult] = []
    for name in args.tasks:
        head, limit = TASKS[name]
        path = heads / f"{name}.json"
        path.write_text(json.dumps(head | {"name": name, "items": str((args.data / head["items"]).absolute())}) + "\n")
        results.append(measure(load_task(str(path)), scorer, model.tokenizer, limit=min(limit, args.limit)))
        write_records(str(args.out / f"{name}.jsonl"), results[-1:])
        print(*table(results[-1:]), sep="\n", flush=True)
    device = f"{platform.machine()}, {processor()}"
    report = facts(device, "jax", "jaxlib", "numpy") | results_json(results)
    report |= {"model": args.run, "dtype": model.decoder.cfg.dtype, **settings}
    if "mmlu" in args.tasks:
        report["sharing"] = compare(
            model, results[args.tasks.index("mmlu")].records[: min(AGAIN, args.limit)], settings
        )
        print(report["sharing"])
    report["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"wrote {write_report(report, args.out, 'evaluate')}")
    if not report.get("sharing", {}).get("same", True):
        raise SystemExit("with and without sharing the choices differ")


def compare(model: Any, records: list[dict[str, Any]], settings: dict[str, int]) -> dict[str, Any]:
    """Scores the same requests with and without sharing, the programs compiled before."""
    pairs = [(r["context"], continuation) for r in records for continuation in r["continuations"]]
    requests = encode_pairs(model.tokenizer, pairs)
    found: dict[str, Any] = {"items": len(records), "requests": len(requests)}
    totals = {}
    for name, share in (("shared", True), ("apart", False)):
        Scorer(model.decoder, model.params, model.mesh, share=share, **settings).loglikelihoods(
            requests[:200]
        )  # compiles
        scorer = Scorer(model.decoder, model.params, model.mesh, share=share, **settings)
        start = time.perf_counter()
        totals[name] = np.array([one.total for one in scorer.loglikelihoods(requests)])
        found[name] = {"tokens": scorer.tokens, "seconds": time.perf_counter() - start}
    furthest = float(np.abs(totals["shared"] - totals["apart"]).max())
    return found | {
        "times_as_fast": found["apart"]["seconds"] / found["shared"]["seconds"],
        "largest_difference": furthest, "same": furthest < 1e-3,
    }  # fmt: skip


if __name__ == "__main__":
    main()

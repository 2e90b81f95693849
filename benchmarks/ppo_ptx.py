"""PPO with and without pretraining text beside it (PPO-ptx): the reward reached, and the pretraining loss kept or lost.

    gptjax pretrain quickstart --run-dir runs/quickstart
    python benchmarks/ppo_ptx.py runs/quickstart --work DIR --out DIR

Both runs are the same but for ptx.weight: the policy goes on with beginnings from the training text, and is rewarded 1
for an answer with an exclamation mark in it, else 0. The pretraining loss is that of the base run's validation split.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import jax
from report import facts, write_report

import gptjax
from gptjax.align.pretraining import PretrainingText
from gptjax.config.plugins import register
from gptjax.data.sources import documents
from gptjax.runs.load import load_model
from gptjax.runs.run import Run
from gptjax.runtime.process import tune_process


def exclaims(answer: str) -> bool:
    return "!" in answer


def write_prompts(source: str, path: Path, count: int) -> None:
    """Beginnings of four to eight words from passages of a text."""
    words, rng = " ".join(doc.text for doc in documents(source)).split(" "), random.Random(0)
    starts = (rng.randrange(len(words) - 8) for _ in range(count))
    rows = ({"prompt": " ".join(words[start : start + rng.randint(4, 8)])} for start in starts)
    path.write_text("\n".join(map(json.dumps, rows)))


def trained(base: str, work: Path, weight: float, steps: int) -> dict[str, Any]:
    """The numbers of the last evaluation of a run, and of the base before it."""
    settings = {
        "init": base,
        "run_dir": str(work / f"ptx_{weight:g}"),
        "data.source": str(work / "prompts.jsonl"),
        "data.batch_size": 64,
        "data.length": 64,
        "rollout.max_new_tokens": 24,
        "rollout.minibatches": 2,
        "rewards.sources": (register(exclaims),),
        "rewards.unfinished": "scored",
        "ptx.source": "init",
        "ptx.weight": weight,
        "steps": steps,
        "optim.learning_rate": 3e-4,
        "optim.schedule": "linear",
        "optim.final_fraction": 0.0,
        "optim.ema": 0.0,
        "evaluate.every": steps,
        "checkpoint.every": steps,
        "sinks": (),
        "model.dtype": "float32",
        "mesh.data": 1,
    }
    config: Any = gptjax.recipe("chat", settings, stage="ppo")
    gptjax.train(config)
    lines = map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines())
    found = next(line for line in lines if "eval_loss" in line)
    before = load_model(base, config.mesh)
    text = PretrainingText(config, Run.at(config.run_dir), before.tokenizer, resumes=False)
    loss = text.evaluate(before.decoder, before.params, before.mesh)["eval_loss_ptx"]
    numbers = {name: found[name] for name in ("eval_reward", "eval_kl", "eval_loss_ptx")}
    return {"weight": weight, "base": loss, "change": numbers["eval_loss_ptx"] / loss - 1} | numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a pretrained run whose data is prepared")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0, 27.8])
    args = parser.parse_args()
    tune_process()
    args.work.mkdir(parents=True, exist_ok=True)
    write_prompts("builtin:shakespeare", args.work / "prompts.jsonl", 2000)
    rows = [trained(args.base, args.work, weight, args.steps) for weight in args.weights]
    for row in rows:
        print(json.dumps(row))
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    report = facts(device, "jax", "jaxlib") | {"steps": args.steps, "answers_a_step": 64, "runs": rows}
    print(write_report(report, args.out, "ppo_ptx"))


if __name__ == "__main__":
    main()

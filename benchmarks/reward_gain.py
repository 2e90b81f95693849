"""A policy against the run it began from, on held-out prompts: reward, KL, and a gold reward that training never saw.

    gptjax grpo chat --init runs/smollm2 --data.source PROMPTS --rewards.sources runs/reward --run-dir runs/policy ...
    python benchmarks/reward_gain.py answers runs/policy --work DIR
    python benchmarks/reward_pairs.py features runs/smollm2 --pairs DIR/pairs.jsonl --out DIR/features.npz
    python benchmarks/reward_gain.py compare --work DIR --pairs HUMAN --features HUMAN.npz --out OUT

`answers` draws one answer to each held-out prompt from both, with the same random numbers, and scores them by the run's
rewards; differences are paired by prompt. `compare` adds the gold: a ridge regression on frozen hidden states, fitted
on human pairs whose first question is none of the prompts, and none of the file in --without; see reward_pairs.py.
Answers that were cut off are read as if they had ended. Of the texts only numbers leave DIR.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import facts, processor, write_report
from reward_pairs import BANDS, POOLS, TOKENS

from gptjax.align.rollout import Sampler, policy_log_probs
from gptjax.align.scoring import Answer, Rewards
from gptjax.config.tuning import PolicyConfig
from gptjax.data.prompts import PromptData
from gptjax.runs.load import load_model
from gptjax.runtime.process import tune_process

BATCH = 16
GOLD = "all", "every", 3.0  # tokens, layers and ridge: the most frequent choice of reward_pairs.py's folds


def gain(difference: np.ndarray) -> dict[str, float]:
    """Mean of paired differences, its standard error, and the share above 0."""
    error = difference.std(ddof=1) / len(difference) ** 0.5
    share = (difference > 0).mean() + (difference == 0).mean() / 2
    return {"mean": float(difference.mean()), "paired_stderr": float(error), "better": float(share)}


def answers(args: argparse.Namespace) -> None:
    tuned = load_model(args.run, None, args.step)
    config = tuned.config
    assert isinstance(config, PolicyConfig), f"{args.run} has no policy that was trained on rewards"
    before = load_model(config.init, None)
    data = PromptData(config, tuned.run.data, training=False)
    held, rewards = data.held[: args.prompts or None], Rewards(config.rewards, config.mesh, data.tokenizer)
    sizes = {"length": config.data.length, "longest": data.longest, "seed": 1}
    sampler = Sampler(tuned.decoder, data.tokenizer, config.rollout, **sizes)
    log_probs = jax.jit(policy_log_probs(tuned.decoder, sampler.vocab_size, config.rollout.temperature))
    names = ("inputs_BL", "targets_BL", "positions_BL", "segments_BL")
    found: dict[str, list[np.ndarray]] = {}
    texts: list[list[str]] = [[], []]
    with jax.set_mesh(tuned.mesh):
        for first in range(0, len(held), BATCH):
            some = held[first : first + BATCH]
            padded = [*some, *[some[-1]] * (BATCH - len(some))]
            for number, (side, model) in enumerate((("before", before), ("after", tuned))):
                drawn = sampler.draw(model.params, padded, first=first, step=0, answers=1)
                rows = zip(some, drawn.texts, drawn.batch["ended_B"].tolist(), drawn.ids)
                scored = rewards([Answer(p.record, text, end, ids, p.origin) for p, text, end, ids in rows])[0]
                of = {"reward": scored, "length": drawn.batch["mask_BL"].sum(-1), "ended": drawn.batch["ended_B"]}
                if model is tuned:
                    batch = {name: jnp.asarray(drawn.batch[name]) for name in names}
                    both = [np.asarray(log_probs(m.params, {}, batch)[0]) for m in (tuned, before)]
                    ratio_BL = (both[0] - both[1]) * drawn.batch["mask_BL"]
                    of |= {"kl": ratio_BL.sum(-1), "kl_k3": (np.expm1(-ratio_BL) + ratio_BL).sum(-1)}
                for name, x_B in of.items():
                    found.setdefault(f"{name}_{side}", []).append(np.asarray(x_B, np.float64)[: len(some)])
                texts[number] += drawn.texts[: len(some)]
            print(f"{first + len(some)}/{len(held)}", flush=True)
    values = {name: np.concatenate(x) for name, x in found.items()}
    differ = [i for i, (a, b) in enumerate(zip(*texts)) if a.strip() != b.strip() and a.strip() and b.strip()]
    pairs = [{"prompt": held[i].record["prompt"], "chosen": texts[1][i], "rejected": texts[0][i]} for i in differ]
    report = {
        "policy": facts(processor(), "jax", "gptjax")["command"],
        "step": tuned.step,
        "prompts": len(held),
        "pairs": differ,
        "reward": gain(values["reward_after"] - values["reward_before"]),
        **{name: float(x.mean()) for name, x in values.items()},
        "kl_stderr": float(values["kl_after"].std(ddof=1) / len(held) ** 0.5),
        "settings": json.loads(tuned.run.config_path.read_text())["settings"],
    }
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (args.work / "answers.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: x for name, x in report.items() if name not in ("settings", "pairs")}, indent=1))


def differences(path: Path) -> np.ndarray:
    """Hidden states of the first answer less those of the second: (tokens, layer, pair, width)."""
    x = np.load(path)["x"]
    x = x.reshape(len(x), 2, len(POOLS), *x.shape[2:]) if x.shape[1] != 2 else x
    return np.moveaxis(x[:, 0].astype(np.float32) - x[:, 1], 0, 2)


def gold_margins(human: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Margins of our pairs by the ridge regression on human ones, as `reward_pairs.by_states` has it."""
    tokens, band, ridge = GOLD
    parts = [(pool, layer) for pool in TOKENS[tokens] for layer in BANDS[band]]
    gram, across = (np.zeros((n, human.shape[2])) for n in (human.shape[2], ours.shape[2]))
    for part in parts:
        scale = human[part].std(0) + 1e-6
        x, y = human[part] / scale, ours[part] / scale
        gram += x @ x.T / (x * x).sum() * len(x) / len(parts)
        across += y @ x.T / (x * x).sum() * len(x) / len(parts)
    return across @ np.linalg.solve(gram + ridge * np.eye(len(gram)), np.ones(len(gram)))


def question(record: dict[str, Any]) -> str:
    asked = record["prompt"]
    return asked if isinstance(asked, str) else asked[0]["content"]


def compare(args: argparse.Namespace) -> None:
    def records(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    report = json.loads((args.work / "answers.json").read_text())
    seen = {question(record) for path in (args.work / "pairs.jsonl", *args.without) for record in records(path)}
    kept = [i for i, record in enumerate(records(args.pairs)) if question(record) not in seen]
    human = differences(args.features)[:, :, kept]
    folds = np.arange(len(kept)) % 5
    right = [gold_margins(human[:, :, folds != f], human[:, :, folds == f]) > 0 for f in range(5)]
    margins = np.zeros(report["prompts"])
    margins[report["pairs"]] = gold_margins(human, differences(args.work / "features.npz"))
    gold = {"human_pairs": len(kept), "accuracy": float(np.concatenate(right).mean()), **gain(margins)}
    whole = facts(processor(), "jax", "gptjax") | report | {"pairs": len(report["pairs"]), "gold": gold}
    print(json.dumps(gold, indent=1))
    print(f"wrote {write_report(whole, args.out, 'reward_gain')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(required=True)
    draw = verbs.add_parser("answers")
    draw.add_argument("run")
    draw.add_argument("--step", type=int, default=0, help="checkpoint; 0: the newest")
    draw.add_argument("--prompts", type=int, default=0, help="held-out prompts to use; 0: all")
    draw.set_defaults(call=answers)
    judge = verbs.add_parser("compare")
    judge.add_argument("--pairs", type=Path, required=True)
    judge.add_argument("--features", type=Path, required=True)
    judge.add_argument("--without", type=Path, nargs="*", default=[])
    judge.add_argument("--out", type=Path, required=True)
    judge.set_defaults(call=compare)
    for verb in (draw, judge):
        verb.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    tune_process()
    args.call(args)


if __name__ == "__main__":
    main()

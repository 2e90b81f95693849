"""Best-of-n of a policy on a recipe's held-out prompts: the chance level of a reward, and what choosing among n gives.

    python benchmarks/best_of_n.py --recipe quickstart --run runs/quickstart --json OUT

Draws 16 answers to each held-out prompt of the recipe's grpo() from the run, scores them, and prints the mean reward of
one answer and of the best of 2, 4 and 16, with the KL that choosing costs at most, log n - (n - 1) / n nats an
answer (Stiennon et al. 2020). A policy trained by `gptjax grpo` is compared with it by eval_reward and eval_kl.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.align.rollout import Sampler
from gptjax.align.scoring import Answer, Rewards
from gptjax.config import GrpoConfig, MeshConfig
from gptjax.config.command_line import load_recipe
from gptjax.data.prompts import PromptData
from gptjax.runs.init_check import with_init
from gptjax.runs.load import load_model
from gptjax.runtime.process import tune_process

MOST = 16


def draw_answers(
    run: str, recipe: str, answers: int, prompts: int = 0, *, held: bool = True
) -> tuple[list[str], np.ndarray]:
    """(texts, reward_PS) of that many answers to each prompt that is held out, or trained on: the first `prompts`."""
    config = load_recipe(recipe).config("grpo")
    assert isinstance(config, GrpoConfig)
    config = with_init(dataclasses.replace(config, init=run, run_dir=f"{run}-none"))
    assert isinstance(config, GrpoConfig)
    model = load_model(run, MeshConfig())
    data = PromptData(config, model.run.folder / "data", training=True)
    rewards, asked = Rewards(config.rewards, config.mesh, data.tokenizer), data.held if held else data.train
    asked = asked[: prompts or None]
    sizes = {"length": config.data.length, "longest": data.longest, "seed": 1}
    sampler = Sampler(model.decoder, data.tokenizer, config.rollout, **sizes)
    texts, found, group = [], [], 128 // answers
    with jax.set_mesh(model.mesh):
        for first in range(0, len(asked), group):
            some = [*asked[first : first + group], *asked[: max(0, first + group - len(asked))]]  # of one shape
            drawn = sampler.draw(model.params, some, first=first, step=0, answers=answers)
            rows = zip([p for p in some for _ in range(answers)], drawn.texts, drawn.batch["ended_B"], drawn.ids)
            reward_B, _ = rewards([Answer(p.record, text, bool(end), ids, p.origin) for p, text, end, ids in rows])
            found.append(reward_B.reshape(-1, answers)[: len(asked) - first])
            texts += drawn.texts[: found[-1].size]
    return texts, np.concatenate(found)


def best_of_n(run: str, recipe: str, prompts: int = 0) -> dict[str, Any]:
    """Mean reward of one answer ("chance") and of the best of 2, 4 and 16, over held-out prompts (0: all of them)."""
    _, reward_PS = draw_answers(run, recipe, MOST, prompts)
    report = {"run": run, "recipe": recipe, "prompts": len(reward_PS), "chance": float(reward_PS.mean())}
    for n in (2, 4, 16):
        best = float(reward_PS.reshape(len(reward_PS), -1, n).max(-1).mean())
        report[f"best_of_{n}"] = {"reward": best, "kl": float(np.log(n) - (n - 1) / n)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--run", required=True)
    parser.add_argument("--prompts", type=int, default=0, help="held-out prompts to use; 0: all")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    report = best_of_n(args.run, args.recipe, args.prompts)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    tune_process()
    main()

"""A model that was trained to call the calculator, on questions that it never saw: right answers with it and without.

    gptjax pretrain calculator
    gptjax sft calculator
    python benchmarks/calculator.py runs/calculator --out benchmarks/results

Sums and products of numbers of three and four digits, asked as the recipe asks, at temperature 0. With the tool the
model is told of it, its calls are made, and it goes on with their results, as `gptjax chat --tools calculator` does. An
answer is right where it is the value in the recipe's sentence. No question of the training data is asked.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from report import facts, processor, write_report

from gptjax.config import GenerateConfig
from gptjax.config.command_line import load_recipe
from gptjax.generation.engine import generate_ids
from gptjax.generation.text_stream import TextStream
from gptjax.runs.load import LoadedModel, load_model
from gptjax.runtime.process import tune_process
from gptjax.serve.tools import Toolbox, open_tools
from gptjax.tokenizer.known_templates import template_of
from gptjax.tokenizer.tool_calls import parse_calls

BATCH = 100


def answers(model: LoadedModel, asked: list[list[dict[str, Any]]], box: Toolbox | None) -> list[list[dict[str, Any]]]:
    """The conversations with the model's answers behind them, after at most one round of calls."""
    tokenizer, template = model.tokenizer, template_of(model.tokenizer)
    cfg, tools = GenerateConfig(max_new_tokens=64, temperature=0.0), box.specs if box else ()
    marks, spaced = template.marks(tokenizer), template.spaced(tokenizer)
    prompts = [template.render(tokenizer, chat, True, tools)[0] for chat in asked]
    prompts += [prompts[0]] * (BATCH - len(prompts))  # of one shape
    with jax.set_mesh(model.mesh):
        said = generate_ids(model.decoder, model.params, prompts, cfg, stop_ids=template.stop_ids(tokenizer))
    done = []
    for chat, ids in zip(asked, said):
        text, calls = parse_calls(TextStream(tokenizer, drops_space=spaced, marks=marks).push(ids, final=True))
        more = [{"role": "assistant", "content": text, "tool_calls": [call.as_openai() for call in calls]}]
        for call in calls if box else ():
            result = box.call(call.name, call.arguments) if box else ""
            more.append({"role": "tool", "tool_call_id": call.id, "content": result})
        done.append([*chat, *more])
    return done


def measure(model: LoadedModel, questions: list[tuple[str, str, str]], box: Toolbox | None) -> dict[str, Any]:
    """Shares of right answers, over all and by operation; with the tool also of right calls."""
    right, calls, count, wrong = Counter(), 0, Counter(), []
    begun = time.perf_counter()
    for first in range(0, len(questions), BATCH):
        some = questions[first : first + BATCH]
        chats = answers(model, [[{"role": "user", "content": asked}] for asked, _, _ in some], box)
        called = [i for i, chat in enumerate(chats) if chat[-1]["role"] == "tool"]
        if called:
            for i, chat in zip(called, answers(model, [chats[i] for i in called], box), strict=True):
                chats[i] = chat
        for (asked, expression, value), chat in zip(some, chats, strict=True):
            operator, said = expression.split()[1], chat[-1]["content"].strip()
            count[operator] += 1
            right[operator] += said == f"It is {value}."
            calls += any(turn["role"] == "tool" and turn["content"] == value for turn in chat)
            if said != f"It is {value}." and len(wrong) < 5:
                wrong.append({"asked": asked, "said": said, "value": value})
    return {
        "questions": len(questions),
        "right": right.total() / len(questions),
        "right_sums": right["+"] / count["+"],
        "right_products": right["*"] / count["*"],
        "right_calls": calls / len(questions),
        "seconds": time.perf_counter() - begun,
        "wrong": wrong,
    }


def new_questions(recipe: Any, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Questions whose expression is none of the training data's."""
    folder, rng = Path(recipe.FOLDER), random.Random(seed)
    known = "".join((folder / name).read_text(encoding="utf-8") for name in ("texts.jsonl", "chats.jsonl"))
    found: list[tuple[str, str, str]] = []
    while len(found) < count:
        asked = recipe.question(rng)
        if f'"{asked[1]}' not in known.replace("\\", "") and asked not in found:
            found.append(asked)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="by gptjax sft calculator")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tune_process()
    model, recipe = load_model(args.run, None), load_recipe("calculator").module
    questions = new_questions(recipe, args.questions, seed=2026)
    found = {
        "with": measure(model, questions, open_tools("calculator")),
        "without": measure(model, questions, None),
    }
    lines = [json.loads(line) for line in model.run.metrics_path.read_text().splitlines()]
    trained = {"steps": model.step, "parameters": sum(x.size for x in jax.tree.leaves(model.params))}
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    path = write_report(
        facts(processor(), "jax", "gptjax") | trained | {"eval_losses": losses} | found, args.out, "calculator"
    )
    for name, r in found.items():
        print(
            f"{name} the tool: {r['right']:.1%} of {r['questions']:,} right (sums {r['right_sums']:.1%}, products "
            f"{r['right_products']:.1%}), right calls {r['right_calls']:.1%}; {r['seconds']:.0f} s"
        )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

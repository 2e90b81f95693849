"""Questions about pictures that a model never saw: its answers, and those without the picture or with another one.

    gptjax sft vqa
    python benchmarks/vqa.py runs/vqa --out benchmarks/results
    gptjax sft vqa --size charts
    python benchmarks/vqa.py runs/charts --set charts --out benchmarks/results

All questions of a test part, at temperature 0, by `gptjax eval`'s task of that name. Beside the answers: those with
a white picture in each one's place; the most frequent answer to each question of the training part, by its text alone;
and pairs of items that ask the same about different pictures and have different answers, their pictures exchanged: a
pair is right where each then gets the other's answer.
"""

import argparse
import dataclasses
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from report import facts, processor, write_report

from gptjax.data.images import Picture, read_image
from gptjax.data.picture_sets import picture_set
from gptjax.evals.measure import measure
from gptjax.evals.metrics import Metric, mean
from gptjax.evals.score import Scorer
from gptjax.evals.tasks import Item, Task, load_task
from gptjax.runs.load import LoadedModel, load_model
from gptjax.runtime.process import tune_process

Answers = Sequence[tuple[Item, bool]]


def answered(model: LoadedModel, task: Task) -> tuple[list[tuple[Item, bool]], float]:
    """Each item, and whether the model's answer is right; and the seconds that took."""
    result = measure(task, Scorer(model.decoder, model.params, model.mesh), model.tokenizer, chat=True)
    return [(item, record["match"]) for item, record in zip(task.items, result.records)], result.seconds


def is_open(item: Item) -> bool:
    return item.answer not in ("yes", "no")


def shares(answers: Answers) -> dict[str, Any]:
    """Shares of right answers with their standard errors: of all, of yes or no, of the others, and by kind."""
    parts: dict[str, Callable[[Item], bool]] = {
        "all": lambda item: True, "yes or no": lambda item: not is_open(item), "open": is_open,
    }  # fmt: skip
    parts |= {kind: lambda item, k=kind: item.group == k for kind in sorted({item.group for item, _ in answers})}
    found: dict[str, Any] = {}
    for name, has in parts.items():
        right = [right for item, right in answers if has(item)]
        if right:
            metric: Metric = mean(right)
            found[name] = {"questions": len(right), "right": metric.value, "stderr": metric.stderr}
    return found


def text_alone(task: Task, name: str) -> Answers:
    """The items, each answered as most questions of the training part with its text are."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in picture_set(name).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["image"].startswith("empty/"):  # a question that was asked before
            continue
        counts[record["question"]][record["answer"]] += 1
    return [(item, counts[item.prompt].most_common(1)[0][0] == item.answer) for item in task.items]


def blank(task: Task) -> Task:
    """The task with a white picture of the same size in the place of each."""
    from PIL import Image

    height, width = read_image(task.items[0].pictures[0].content, "picture").shape[:2]
    content = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(content, "PNG")
    white = (Picture.of(content.getvalue(), "white"),)
    return dataclasses.replace(task, items=tuple(dataclasses.replace(item, pictures=white) for item in task.items))


def exchanged(task: Task, pairs: int, seed: int = 0) -> Task:
    """Items in pairs, each with the picture and the answer of its other."""
    rng, by_question = random.Random(seed), defaultdict(list)
    for item in task.items:
        by_question[item.prompt].append(item)
    several = sorted(q for q, items in by_question.items() if len({item.answer for item in items}) > 1)
    made: list[Item] = []
    while len(made) < 2 * pairs:
        a, b = rng.sample(by_question[rng.choice(several)], 2)
        if a.answer != b.answer:
            made += [dataclasses.replace(a, pictures=b.pictures, answers=b.answers),
                     dataclasses.replace(b, pictures=a.pictures, answers=a.answers)]  # fmt: skip
    return dataclasses.replace(task, items=tuple(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="by gptjax sft vqa")
    parser.add_argument("--set", choices=("easy_vqa", "charts"), default="easy_vqa")
    parser.add_argument("--limit", type=int, default=0, help="questions; 0: all")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tune_process()
    task = load_task(args.set)
    task = dataclasses.replace(task, items=task.items[: args.limit or None])
    model = load_model(args.run, None)
    answers, seconds = answered(model, task)
    others, _ = answered(model, exchanged(task, args.pairs))
    both = [a and b for (_, a), (_, b) in zip(others[::2], others[1::2])]
    found = {
        "with the picture": shares(answers),
        "with a white picture": shares(answered(model, blank(task))[0]),
        "by the text alone": shares(text_alone(task, args.set)),
        "pictures exchanged": {"all": {"questions": len(both), "right": mean(both).value, "stderr": mean(both).stderr}},
    }
    lines = [json.loads(line) for line in model.run.metrics_path.read_text().splitlines()]
    trained = {
        "steps": model.step,
        "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
        "training_seconds": max(line.get("seconds", 0.0) for line in lines),
        "seconds": seconds,
    }
    path = write_report(facts(processor(), "jax", "gptjax", "pillow") | trained | found, args.out, f"vqa_{args.set}")
    for name, parts in found.items():
        print(f"{name}:")
        for part, r in parts.items():
            print(f"  {part:24} {r['right']:7.2%} +- {r['stderr']:.2%} of {r['questions']:,}")
    print(f"{len(answers):,} questions in {seconds:.0f} s; wrote {path}")


if __name__ == "__main__":
    main()

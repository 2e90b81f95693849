"""A task's items given to a model: what it makes of each, and the task's numbers."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.config import GenerateConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.evals.metrics import (
    Metric,
    choice_metrics,
    cloze_metrics,
    generation_metrics,
    normalised,
    text_metrics,
)
from gptjax.evals.requests import encode_answers, encode_pairs
from gptjax.evals.score import Likelihood, Scorer
from gptjax.evals.tasks import Item, Task
from gptjax.generation.chat import continue_ids
from gptjax.generation.image_places import Pictures
from gptjax.generation.image_prompts import behind_pictures, place_pictures, reading_once, with_pictures
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of

ROWS = 16  # prompts that are generated from at once

Record = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """The numbers of a task, the first metric its own, and a record of each item."""

    task: Task
    metrics: dict[str, Metric]
    records: list[Record]
    truncated: int
    """Items that lost tokens on their left, for the model's context is shorter."""
    tokens: int
    """Tokens that were computed."""
    seconds: float


def measure(
    task: Task, scorer: Scorer, tokenizer: Tokenizer, *, limit: int = 0, seed: int = 0, chat: bool = False
) -> TaskResult:
    """Measures a task on its first `limit` items (0: all); `seed` draws the examples.

    With `chat` a prompt, its examples in it, is a user's message in the tokenizer's chat template, and what is scored
    the answer to it, without a separator; texts stay as they are. An item's pictures stand in front of its prompt. Each
    record holds the item's number, the texts that were scored, as they were, and what came of them.
    """
    start, before = time.perf_counter(), scorer.tokens
    items = task.items[:limit] if limit else task.items
    try:
        records = _KINDS[task.config.kind](task, items, scorer, tokenizer, seed, chat)
    except InputError as error:
        raise InputError(f"{task.path}: {error}") from None
    metrics = {
        "text": text_metrics,
        "multiple_choice": lambda of: choice_metrics(of, task.config.metric or "acc_norm"),
        "cloze": cloze_metrics,
        "generation": generation_metrics,
    }[task.config.kind](records)
    truncated = sum(record["truncated"] > 0 for record in records)
    return TaskResult(task, metrics, records, truncated, scorer.tokens - before, time.perf_counter() - start)


def _record(task: Task, item: Item, **found: Any) -> Record:
    front = {"task": task.name, "shots": task.config.shots, "item": item.number, "kind": task.config.kind}
    return front | ({"images": [picture.key for picture in item.pictures]} if item.pictures else {}) | found


def _texts(task: Task, items: Sequence[Item], scorer: Scorer, tokenizer: Tokenizer, *_) -> list[Record]:
    found = scorer.rolling(tokenizer.encode_batch([item.prompt for item in items]), tokenizer.bos_id)
    return [
        _record(task, item, text=item.prompt, score=one.total, tokens=len(one.log_probs),
                bytes=len(item.prompt.encode()), words=len(re.split(r"\s+", item.prompt)), truncated=one.truncated)
        for item, one in zip(items, found, strict=True)
    ]  # fmt: skip


def _choices(
    task: Task, items: Sequence[Item], scorer: Scorer, tokenizer: Tokenizer, seed: int, chat: bool
) -> list[Record]:
    prompts = [task.prompt(item, seed) for item in items]
    separator = "" if chat else task.config.separator
    pairs = [(item, prompt, separator + a) for item, prompt in zip(items, prompts) for a in item.answers]
    found = iter(_likelihoods(pairs, scorer, tokenizer, chat))
    records = []
    for item, prompt in zip(items, prompts, strict=True):
        likelihoods = [next(found) for _ in item.answers]
        scores, tokens = np.array([one.total for one in likelihoods]), [len(one.log_probs) for one in likelihoods]
        characters = [len(answer) for answer in item.answers]
        best = {"choice": scores / characters, "choice_sum": scores, "choice_token": scores / tokens}
        records.append(
            _record(task, item, context=prompt, continuations=[separator + a for a in item.answers],
                    scores=scores.tolist(), tokens=tokens, characters=characters, gold=list(item.gold),
                    **{name: int(np.argmax(by)) for name, by in best.items()},
                    truncated=max(one.truncated for one in likelihoods))
        )  # fmt: skip
    return records


def _cloze(
    task: Task, items: Sequence[Item], scorer: Scorer, tokenizer: Tokenizer, seed: int, chat: bool
) -> list[Record]:
    separator = "" if chat else task.config.separator
    pairs = [(item, task.prompt(item, seed), separator + item.answer) for item in items]
    found = _likelihoods(pairs, scorer, tokenizer, chat)
    return [
        _record(task, item, context=context, continuations=[text], score=one.total, tokens=len(one.log_probs),
                greedy=one.greedy, truncated=one.truncated)
        for (item, context, text), one in zip(pairs, found, strict=True)
    ]  # fmt: skip


def _generated(
    task: Task, items: Sequence[Item], scorer: Scorer, tokenizer: Tokenizer, seed: int, chat: bool
) -> list[Record]:
    cfg = GenerateConfig(max_new_tokens=task.config.max_new_tokens, temperature=0.0, stop=task.config.stop)
    most = scorer.decoder.context - cfg.max_new_tokens
    prompts = [task.prompt(item, seed) for item in items]
    if chat:
        template = template_of(tokenizer)
        asked = [{"role": "user", "content": with_pictures(p, item.pictures)} for item, p in zip(items, prompts)]
        ids = [template.render(tokenizer, [one], add_generation_prompt=True)[0] for one in asked]
    else:
        ids = [behind_pictures(tokenizer, tokenizer.prompt_ids(p), item.pictures) for item, p in zip(items, prompts)]
    ids, pictures = _placed(ids, items, scorer.decoder.cfg.vision)
    scorer.tokens += sum(min(len(row), most) for row in ids)
    texts = [""] * len(items)
    # Those with one picture stay together, so that it is encoded once, and others with those of their length.
    order = sorted(range(len(items)), key=lambda n: (min([0, *ids[n]]), len(ids[n])))
    with jax.set_mesh(scorer.mesh):
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            some, more = [ids[n] for n in rows], {"chat": chat, "pictures": pictures}
            for n, text in zip(rows, continue_ids(scorer.decoder, scorer.params, tokenizer, some, cfg, **more)):
                texts[n] = text
    how = task.config.normalise
    return [
        _record(task, item, context=prompt, text=text, answers=list(item.answers),
                match=normalised(text, how) in [normalised(answer, how) for answer in item.answers],
                **({"group": item.group} if task.config.by else {}),
                truncated=max(0, len(row) - most))
        for item, prompt, text, row in zip(items, prompts, texts, ids, strict=True)
    ]  # fmt: skip


def _likelihoods(
    pairs: Sequence[tuple[Item, str, str]], scorer: Scorer, tokenizer: Tokenizer, chat: bool
) -> list[Likelihood]:
    """The likelihood of each (item, context, continuation), behind the item's pictures."""
    texts, items = [(context, text) for _, context, text in pairs], [item for item, _, _ in pairs]
    if chat:
        requests = encode_answers(tokenizer, texts, [item.pictures for item in items])
    else:
        encoded = encode_pairs(tokenizer, texts)
        requests = [(behind_pictures(tokenizer, a, item.pictures), b) for item, (a, b) in zip(items, encoded)]
    contexts, pictures = _placed([context for context, _ in requests], items, scorer.decoder.cfg.vision)
    return scorer.loglikelihoods([(ids, b) for ids, (_, b) in zip(contexts, requests, strict=True)], pictures)


def _placed(
    prompts: Sequence[list[int]], items: Sequence[Item], vision: VisionConfig
) -> tuple[list[list[int]], Pictures]:
    """The prompts with their items' pictures in place, and the patches of each picture, which is read once."""
    read = reading_once()
    placed = [place_pictures(ids, item.pictures, vision, read) for ids, item in zip(prompts, items, strict=True)]
    return [one.ids for one in placed], {place: patches for one in placed for place, patches in one.pictures.items()}


_KINDS: dict[str, Callable[..., list[Record]]] = {
    "text": _texts, "multiple_choice": _choices, "cloze": _cloze, "generation": _generated,
}  # fmt: skip

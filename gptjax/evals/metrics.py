"""Numbers of a task from those of its items, each with a standard error over the items.

acc: the share of items whose likeliest answer is right, by the sum of log p; acc_norm: by the sum divided by the
answer's characters (lm-eval); acc_token: divided by its tokens (GPT-3, Brown et al. 2020, section 2.4).
bits_per_byte = -(sum of log p) / (ln 2 x UTF-8 bytes) over all texts, perplexity = exp(-(sum of log p) / tokens), and
word_perplexity the same a word (what white space separates), as in lm-eval. Of a cloze task, perplexity = exp(-mean
log p of a continuation), LAMBADA's. centred = (value - chance) / (1 - chance): 0 by chance, 1 if all is right.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Metric:
    """One number of a task; `stderr` is its standard error, nan where one item gives none."""

    value: float
    stderr: float
    chance: float | None = None
    """The value that guessing has; None where that is no question."""

    @property
    def centred(self) -> float | None:
        return None if self.chance is None else (self.value - self.chance) / (1 - self.chance)


def mean(values: Sequence[float] | np.ndarray, chance: float | None = None) -> Metric:
    """The mean, with s / sqrt(n) of the sample's standard deviation s (n - 1)."""
    array = np.asarray(values, np.float64)
    stderr = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return Metric(float(array.mean()), stderr, chance)


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Metric:
    """sum(tops) / sum(bottoms), whose standard error is that of the mean of top - value x bottom (the delta method)."""
    top, bottom = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    value = float(top.sum() / bottom.sum())
    return Metric(value, mean(top - value * bottom).stderr / float(bottom.mean()))


def exponential(of: Metric) -> Metric:
    """exp of a metric, by the delta method."""
    value = math.exp(min(of.value, 700.0))
    return Metric(value, value * of.stderr)


def text_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    nats = [-record["score"] for record in records]
    bits = ratio(nats, [record["bytes"] * math.log(2) for record in records])
    tokens, words = (ratio(nats, [record[unit] for record in records]) for unit in ("tokens", "words"))
    return {"bits_per_byte": bits, "perplexity": exponential(tokens), "word_perplexity": exponential(words)}


def choice_metrics(records: Sequence[dict[str, Any]], first: str) -> dict[str, Metric]:
    chance = float(np.mean([len(record["gold"]) / len(record["scores"]) for record in records]))
    names = {"acc_norm": "choice", "acc": "choice_sum", "acc_token": "choice_token"}
    found = {m: mean([r[choice] in r["gold"] for r in records], chance) for m, choice in names.items()}
    return {first: found.pop(first)} | found


def cloze_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    likelihood = mean([-record["score"] for record in records])
    return {"acc": mean([record["greedy"] for record in records], 0.0), "perplexity": exponential(likelihood)}


def generation_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    found = {"exact_match": mean([record["match"] for record in records], 0.0)}
    for group in sorted({record["group"] for record in records if "group" in record}):
        of_group = [record["match"] for record in records if record["group"] == group]
        found[f"exact_match {group}"] = mean(of_group, 0.0)
    return found


def normalised(text: str, how: str) -> str:
    """The part of a text that is compared; see TaskConfig.normalise. SQuAD: Rajpurkar et al. 2016."""
    if how == "last_number":
        kept = "".join(c if c.isdigit() or c in "-." else " " for c in text.replace(",", ""))
        numbers = [
            number for word in kept.split() if (number := word.strip(".")).strip("-").replace(".", "", 1).isdigit()
        ]
        return numbers[-1] if numbers else ""
    if how == "squad":
        plain = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))
    return text.strip()

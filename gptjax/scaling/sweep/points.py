"""Points of a grid of budgets and sizes: the steps of each run, and the start of its decay."""

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config import TrainConfig, defining_settings
from gptjax.config.command_line import Recipe, given_names, parse
from gptjax.config.section import InputError
from gptjax.config.sweep import SweepConfig
from gptjax.data.manifest import with_corpus_tokenizer
from gptjax.model.counts import parameters, token_flops


@dataclass(frozen=True)
class Point:
    """One run of the grid: a size trained for a budget. Batch and learning rate are the recipe's at that size.

    They must not depend on the budget, so that horizons can share their steps before the decay.
    """

    size: str
    seed: int
    budget: float
    steps: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.size}_{budget_text(self.budget)}_{self.seed}"

    @property
    def decay_start(self) -> int:
        """The last step up to which this run equals any longer one, bit for bit."""
        return decay_start(self.config, self.steps)

    @property
    def batch_tokens(self) -> int:
        return self.config.data.batch_size * self.config.data.length

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> float:
        """FLOPs of the training, which whole steps bring near the budget."""
        return self.tokens * token_flops(self.config)

    @property
    def counts(self) -> dict[str, int]:
        return parameters(self.config.model, self.config.tokenizer.vocab_size, self.config.data.length)

    @property
    def settings(self) -> str:
        """A digest of the settings that define the run, without its seed and length."""
        same = {n: v for n, v in defining_settings(self.config).items() if n not in ("seed", "steps")}
        same["evaluate.max_rows"] = self.config.evaluate.max_rows  # the same run, but another loss
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def decay_start(config: TrainConfig, steps: int) -> int:
    """Steps of a run of `steps` before its learning rate falls below that of a longer one.

    Step i makes update u = i - 1, and optim.make_schedule has every update u <= steps - decay_steps at the peak.
    """
    return max(0, math.floor(steps - config.optim.decay_steps(steps)))


def budget_text(budget: float) -> str:
    """The shortest text of this number, in the form 3.16e13."""
    return np.format_float_scientific(budget, trim="-", exp_digits=1).replace("+", "")


def split_entries(settings: Sequence[str]) -> list[str]:
    """NAME=VALUE entries as words of a command line; values are separated by spaces, quoted as in a shell.

    Raises InputError for a quote that is not closed.
    """
    flags = []
    for entry in settings:
        name, _, value = entry.partition("=")
        if value in ("True", "False"):
            group, dot, last = name.rpartition(".")
            flags.append(f"--{name}" if value == "True" else f"--{group}{dot}no-{last}")
        else:
            try:
                words = shlex.split(value)
            except ValueError as e:
                raise InputError(f'set={entry!r}: {e}; wanted values quoted as in a shell: NAME="it\'s"') from e
            flags += [f"--{name}", *(words or [""])]
    return flags


def make_points(cfg: SweepConfig, recipe: Recipe) -> list[Point]:
    """The points of the grid, without duplicates.

    Raises InputError for a recipe whose schedule shares no steps between horizons, a budget that ends within a size's
    warm-up, an invalid seed, and sizes that read different data.
    """
    if not cfg.grid:
        raise InputError("grid is missing; wanted e.g. --grid 1e14:4,6 3e14:4,6,8")
    points: dict[str, Point] = {}
    configs: dict[str, TrainConfig] = {}
    for budget, size, seed in cfg.points:
        if size not in configs:
            words = split_entries(cfg.set)
            given = parse(recipe.config("pretrain", size), words, f"gptjax sweep {recipe.path}")
            given = with_corpus_tokenizer(given, given_names(words))
            configs[size] = _checked(given, size, next(iter(configs.values()), given))
        config = configs[size]
        steps = round(budget / token_flops(config) / (config.data.batch_size * config.data.length))
        warmup = config.optim.warmup_steps
        if steps < 2 or decay_start(config, steps) < warmup:
            raise InputError(
                f"{budget_text(budget)} FLOPs train size {size} for {steps} steps, whose decay begins within the "
                f"warm-up of {warmup}; give a larger budget, a smaller size or fewer warm-up steps"
            )
        config = dataclasses.replace(config, steps=steps, seed=config.seed if seed is None else seed)
        point = Point(size, config.seed, budget, steps, config)
        points[point.name] = point
    return list(points.values())


def _checked(config: TrainConfig, size: str, first: TrainConfig) -> TrainConfig:
    if config.optim.schedule != "wsd":
        raise InputError(
            f"optim.schedule={config.optim.schedule!r} at size {size}: wanted 'wsd', whose steps before the decay are "
            "the same for every length; give --set optim.schedule=wsd"
        )
    for name in ("source", "mixture", "loading", "validation_fraction", "text_field", "max_corrupt"):
        ours, theirs = getattr(config.data, name), getattr(first.data, name)
        if ours != theirs:
            raise InputError(f"data.{name} is {theirs!r} at one size and {ours!r} at size {size}; wanted one corpus")
    if config.tokenizer != first.tokenizer:
        raise InputError(f"size {size} has another tokenizer than the sizes before it; wanted one for all")
    return config

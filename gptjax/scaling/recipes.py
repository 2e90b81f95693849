"""Batch size and learning rate by published rules: each a formula, its source, and the range of its measurements.

The rules disagree by factors of up to several: one transfers where the model, tokenizer and optimizer are like the
paper's (AdamW, decoders), and a short sweep at a small size is more reliable than any of them.
Units: tokens, parameters without embeddings, FLOPs; a learning rate is the peak of its schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptjax.config.section import InputError
from gptjax.scaling.laws import KAPLAN_ND


@dataclass(frozen=True)
class BatchRule:
    """batch_tokens(N, D) and learning_rate(N, D): functions of non-embedding parameters and trained tokens."""

    source: str
    measured: str
    batch_tokens: Callable[[float, float], float]
    learning_rate: Callable[[float, float], float]


def critical_batch(loss: float) -> float:
    """B_crit(L) = 2e8 tokens / L^(1 / 0.21): time and compute are both within twice their least (Kaplan 2020, 1.4)."""
    return 2e8 / loss ** (1 / 0.21)


def _kaplan_rate(N: float, D: float) -> float:
    rate = 0.003239 - 0.0001395 * np.log(N)  # equation D.1; 0 at 1.2e10
    if rate <= 0:
        raise InputError(f"Kaplan's learning rate for N={N:g} is not above 0: wanted fewer than 1.2e10 parameters")
    return float(rate)


# C in DeepSeek's formulas is M D with M the FLOPs of a token without embeddings, attention counted; 6 N is near it.
BATCH_RULES = {
    "deepseek": BatchRule(
        "DeepSeek LLM 2024 (arXiv 2401.02954), equation 1: B = 0.2920 C^0.3271, rate = 0.3118 C^-0.1250, C = 6 N D",
        "C from 1e17 to 2e19, within 0.25 % of the least loss of each sweep; used up to 3e24",
        lambda N, D: 0.2920 * (6 * N * D) ** 0.3271,
        lambda N, D: 0.3118 * (6 * N * D) ** -0.1250,
    ),
    "steplaw": BatchRule(
        "Step Law, Li et al. 2025 (arXiv 2503.04715): B = 0.58 D^0.571, rate = 1.79 N^-0.713 D^0.307",
        "3,700 runs, N from 6e7 to 1e9, D from 2e9 to 1e11, final rate 1e-5",
        lambda N, D: 0.58 * D**0.571,
        lambda N, D: 1.79 * N**-0.713 * D**0.307,
    ),
    "kaplan": BatchRule(
        "Kaplan et al. 2020 (arXiv 2001.08361): B_crit of equation 1.4 at the loss of equation 1.5, rate of D.1",
        "WebText2, N from 768 to 1.5e9, Adam or Adafactor, 1,024 tokens a row",
        lambda N, D: critical_batch(float(KAPLAN_ND.loss(N, D))),
        _kaplan_rate,
    ),
}


def batch_rule(name: str, N: float, D: float) -> dict[str, float | str]:
    """batch_tokens, learning_rate and source for N non-embedding parameters and D tokens; InputError for bad input."""
    if name not in BATCH_RULES:
        raise InputError(f"recipe={name!r}: wanted one of {sorted(BATCH_RULES)}")
    for key, value in (("N", N), ("D", D)):
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{key}={value}: wanted a finite number above 0")
    chosen = BATCH_RULES[name]
    return {
        "batch_tokens": float(chosen.batch_tokens(N, D)),
        "learning_rate": float(chosen.learning_rate(N, D)),
        "source": chosen.source,
        "measured": chosen.measured,
    }

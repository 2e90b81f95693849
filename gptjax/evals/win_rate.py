"""Win rate of one run over another: answers of both to the same prompts, of which a reward run says the better."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.config import EvalConfig, GenerateConfig
from gptjax.config.section import InputError
from gptjax.data.formats import read_records
from gptjax.data.preferences import written
from gptjax.data.prompts import Prompt, prompt_of
from gptjax.data.rendered import record_files
from gptjax.evals.metrics import mean
from gptjax.evals.preferences import load_scorer
from gptjax.generation.chat import stream_answers
from gptjax.runs.load import LoadedModel, load_model
from gptjax.tokenizer.known_templates import template_of

ROWS = 32  # prompts that are answered at once
NORMAL = 1.959964  # of a normal distribution, 95 % lies within so many standard deviations


def win_rate(run_dir: str | Path, cfg: EvalConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """The numbers of `compare` for the run and the one in cfg.against, by the scores of cfg.judge.

    Both answer cfg.prompts as messages of a user, by the same seed. The judge reads answers through its own tokenizer
    and template, so that the runs may have others. Raises InputError where cfg.judge is no reward run, a run has no
    template, or an answer does not fit into the judge's rows.
    """
    scorer, judge = load_scorer(cfg.judge, cfg.mesh)
    given = [
        prompt_of(record, origin, judge.tokenizer)
        for path in record_files(cfg.prompts, "prompts")
        for origin, record in read_records(path)
    ][: cfg.limit or None]
    template, scores = template_of(judge.tokenizer), []
    for name in (run_dir, cfg.against):
        model = load_model(name, cfg.mesh, cfg.step if name is run_dir else 0)
        note(f"answers of {name}, step {model.step:,}, to {len(given):,} prompts")
        texts = answers_of(model, given, cfg)
        asked = [[*messages(prompt), {"role": "assistant", "content": text}] for prompt, text in zip(given, texts)]
        scores.append(scorer([written(template.render(judge.tokenizer, dialogue)) for dialogue in asked]))
    return compare(*scores)


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as the messages in front of its answer."""
    asked = prompt.record["prompt"]
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)


def answers_of(model: LoadedModel, prompts: Sequence[Prompt], cfg: EvalConfig) -> list[str]:
    """One answer to each prompt, sampled at temperature 1; raises InputError where the run has no chat template."""
    texts = [""] * len(prompts)
    with jax.set_mesh(model.mesh):
        for first in range(0, len(prompts), ROWS):
            asked = [messages(prompt) for prompt in prompts[first : first + ROWS]]
            sampling = GenerateConfig(max_new_tokens=cfg.max_new_tokens, temperature=1.0, seed=cfg.seed + first)
            for row, piece in stream_answers(model.decoder, model.params, model.tokenizer, asked, sampling):
                texts[first + row] += piece
    return texts


def compare(score_P: np.ndarray, other_P: np.ndarray) -> dict[str, Any]:
    """Numbers of scores of two answers to each prompt.

    win_rate counts a tie as half a win; win_rate_low and win_rate_high are Wilson's interval of 95 % (Wilson 1927).
    reward_gain is the mean difference of the scores, with the standard error of a paired test.
    """
    if len(score_P) != len(other_P) or not len(score_P):
        raise InputError(f"{len(score_P)} and {len(other_P)} answers: wanted one each to at least one prompt")
    gain_P, n = score_P.astype(np.float64) - other_P, len(score_P)
    won = float((np.sign(gain_P) + 1).mean() / 2)
    middle = (won + NORMAL**2 / 2 / n) / (1 + NORMAL**2 / n)
    half = NORMAL / (1 + NORMAL**2 / n) * math.sqrt(won * (1 - won) / n + (NORMAL / 2 / n) ** 2)
    gain = mean(gain_P)
    return {
        "win_rate": won,
        "win_rate_low": middle - half,
        "win_rate_high": middle + half,
        "ties": int((gain_P == 0).sum()),
        "reward": float(score_P.mean()),
        "reward_against": float(other_P.mean()),
        "reward_gain": gain.value,
        "reward_gain_stderr": gain.stderr,
        "prompts": n,
    }

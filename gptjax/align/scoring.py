"""Sources of rewards: functions of the user, reward models, or several of both with weights.

A function is called by the names of its parameters, with the prompt as its record has it, the answer's text, ended
(True unless it was cut off), and any other fields of the record:

    def reward(prompt, answer, solution): return 1.0 if solution in answer else 0.0

One with parameters `prompts` and `answers` is given lists of everything, and returns a list of numbers. It is imported
by the verbs that train on it alone.
"""

import hashlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.align.rewards import end_of_text_rule
from gptjax.config import MeshConfig
from gptjax.config.plugins import is_name, is_registered, resolve
from gptjax.config.section import InputError, one_line
from gptjax.config.tuning import RewardsConfig
from gptjax.evals.preferences import load_scorer
from gptjax.runs.digest import tree_sha256
from gptjax.tokenizer import Tokenizer

OURS = ("prompt", "answer", "ended")
SIGNATURES = "reward(prompt, answer, **record) -> float, or reward(prompts, answers, **record) -> list of floats"


class Answer(NamedTuple):
    """An answer to the prompt of a record, as it is scored."""

    record: Mapping[str, Any]
    """The prompt's record, "prompt" among its fields."""
    text: str
    """The text of the answer, without the token that ends it."""
    ended: bool
    """It ended by itself; else it was cut off."""
    ids: Sequence[int]
    """The ids of the prompt and of the answer behind it, with the token that ends it."""
    origin: str = "a prompt"
    """The place of the record, for messages."""


Source = Callable[[Sequence[Answer]], np.ndarray]
"""One float32 for each answer."""
Mark = dict[str, Any]
"""The identity of a source by content, to be saved with what was trained on it."""


class Rewards:
    """The sources of a run's reward, opened: functions imported, reward models loaded.

    `marks` holds for each source, by name, what identifies its content. A reward model reads ids, so that its tokenizer
    must be that of the policy. Raises InputError where a source can't be used.
    """

    def __init__(self, cfg: RewardsConfig, mesh: MeshConfig, tokenizer: Tokenizer):
        if not cfg.sources:
            raise InputError(
                "rewards.sources=(): wanted a function or a reward run; add --rewards.sources module:function"
            )
        self.cfg = cfg
        self.sources: dict[str, Source] = {}
        self.marks: dict[str, Mark] = {}
        for name, source in cfg.by_name.items():
            opened = UserReward.open(source) if names_function(source) else open_run(source, mesh, tokenizer)
            self.sources[name], self.marks[name] = opened

    def __call__(self, answers: Sequence[Answer]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(reward_B, {"reward_NAME": what that source gave}) of answers, float32.

        Of an answer that was cut off the reward is rewards.fixed, unless rewards.unfinished is scored; by source it is
        as given. A source without a name has no entry. Raises InputError where a function fails or gives no number.
        """
        given = {name: source(answers) for name, source in self.sources.items()}
        weights = self.cfg.weights or (1.0,) * len(given)
        reward_B = np.zeros(len(answers), np.float32)
        for weight, x_B in zip(weights, given.values(), strict=True):
            reward_B += weight * x_B
        if self.cfg.unfinished == "fixed":
            ended_B = np.array([answer.ended for answer in answers])
            reward_B = np.asarray(end_of_text_rule(reward_B, ended_B, self.cfg.fixed))
        return reward_B, {f"reward_{name}": x_B for name, x_B in given.items() if name}

    def check(self, marks: Mapping[str, Mark]) -> None:
        """Raises InputError where a checkpoint's marks are not those of these sources."""
        for name, mark in self.marks.items():
            if marks.get(name) != mark:
                source = self.cfg.by_name[name]
                raise InputError(
                    f"rewards.sources: {name or source} is not what this run began with ({source} has another content "
                    "or step); restore it, or train another run: --run-dir FOLDER with --init"
                )
        if gone := marks.keys() - self.marks.keys():
            raise InputError(f"rewards.sources: {sorted(gone)[0]!r} is missing, which this run began with")


def names_function(source: str) -> bool:
    """True for the name of a function; a folder of that name is one."""
    return is_registered(source) or (is_name(source) and not Path(source).exists())


def open_run(source: str, mesh: MeshConfig, tokenizer: Tokenizer) -> tuple[Source, Mark]:
    """The reward model of a run as a source, less the score of demonstrations, and its step and digest.

    Raises InputError where it is none, is not finished, or has another tokenizer or template.
    """
    try:
        scorer, model = load_scorer(source, mesh)
    except InputError as e:
        raise InputError(f"rewards.sources: {e}") from e
    own = model.tokenizer
    if (own.sha256, own.template) != (tokenizer.sha256, tokenizer.template):
        raise InputError(
            f"rewards.sources: {source} has another tokenizer or chat template than the policy, whose ids it would "
            "read; wanted a reward model that began from a run with the same"
        )
    mark = {"step": model.step, "sha256": tree_sha256(model.params), "mean": scorer.mean}
    return (lambda answers: scorer([answer.ids for answer in answers])), mark


class UserReward:
    """A function of the user as a source: see the top of this file."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function = name, function
        kinds = inspect.Parameter
        parameters = inspect.signature(function).parameters
        self.batched = {"prompts", "answers"} <= parameters.keys()
        self.takes_all = any(p.kind == kinds.VAR_KEYWORD for p in parameters.values())
        by_name = [p for p in parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        self.names = [p.name for p in by_name]
        self.required = [p.name for p in by_name if p.default is kinds.empty]
        unnamed = any(p.kind == kinds.POSITIONAL_ONLY and p.default is kinds.empty for p in parameters.values())
        if unnamed or not (self.batched or self.takes_all or "answer" in self.names):
            raise InputError(f"rewards.sources: {name} takes {inspect.signature(function)}; wanted {SIGNATURES}")

    @classmethod
    def open(cls, name: str) -> tuple["UserReward", Mark]:
        """The function of that name, imported, and the sha256 of its file; raises InputError where there is none."""
        source = cls(name, function := resolve(name, "rewards.sources"))
        try:
            file = inspect.getsourcefile(inspect.unwrap(function))
            content = Path(file).read_bytes() if file else b""
        except (OSError, TypeError):  # made in a session, or in C
            content = b""
        return source, {"function": name.partition(":")[2], "sha256": hashlib.sha256(content).hexdigest()}

    def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
        rows = [self._arguments(answer) for answer in answers]
        if not self.batched:
            return np.array([self._number(self._call(row, a), a) for row, a in zip(rows, answers)], np.float32)
        names = {name: None for row in rows for name in row}
        columns = {name: [row.get(name) for row in rows] for name in names}
        for ours in OURS:
            columns[f"{ours}s" if ours != "ended" else ours] = columns.pop(ours)
        given = self._call(self._accepted(columns), None)
        try:
            values = list(given)
        except TypeError:
            values = None
        if values is None or isinstance(given, str | bytes | Mapping):
            raise InputError(f"{self.name} returned {given!r:.80}; wanted a list of {len(answers)} numbers")
        if len(values) != len(answers):
            raise InputError(f"{self.name} returned {len(values)} numbers; wanted {len(answers)}, one for each answer")
        return np.array([self._number(x, answer) for x, answer in zip(values, answers)], np.float32)

    def _arguments(self, answer: Answer) -> dict[str, Any]:
        """The fields known of an answer; a function that does not take all is given those that its parameters name."""
        taken = [name for name in OURS if name != "prompt" and name in answer.record]
        if taken:
            raise InputError(f"{answer.origin} has a field {taken[0]!r}, which is what a reward gets of the answer; "
                             "give the field another name")  # fmt: skip
        known = {**answer.record, "answer": answer.text, "ended": answer.ended}
        missing = [n for n in self.required if n not in known and not (self.batched and n in ("prompts", "answers"))]
        if missing:
            raise InputError(f"{self.name} wants {missing[0]!r}, which {answer.origin} does not have; "
                             f"it has {', '.join(sorted(answer.record))}")  # fmt: skip
        return known if self.batched else self._accepted(known)

    def _accepted(self, known: dict[str, Any]) -> dict[str, Any]:
        return known if self.takes_all else {name: x for name, x in known.items() if name in self.names}

    def _call(self, arguments: dict[str, Any], answer: Answer | None) -> Any:
        try:
            return self.function(**arguments)
        except Exception as e:  # whatever the user's function raises
            at = traceback.extract_tb(e.__traceback__)[-1]
            raise InputError(f"{self.name} failed{f' for {answer.origin}' if answer else ''}: {type(e).__name__}: "
                             f"{one_line(e)} ({at.filename}:{at.lineno})") from e  # fmt: skip

    def _number(self, value: Any, answer: Answer) -> float:
        value = value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise InputError(
                f"{self.name} returned {value!r:.80} for {answer.origin}, answer {one_line(answer.text, 60)!r}; "
                "wanted a finite number"
            )
        return float(value)

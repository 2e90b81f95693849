"""Preferences: answers to one prompt from the best to the worst, read, rendered by a template, and laid out in rows.

The answers of a prompt stay together: each in a row of its own behind the prompt (`PreferenceRows`), or all in one row
(`AnswerTrees`). None is cut: a prompt whose answers do not fit is left out and counted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.config.section import InputError, one_line
from gptjax.data.dialogue import Messages, messages_of
from gptjax.data.formats import read_records
from gptjax.data.image_messages import refuse_images
from gptjax.data.packing import Batch, example_batch, pad_documents
from gptjax.data.permutation import shuffled
from gptjax.tokenizer.interface import Tokenizer
from gptjax.tokenizer.templates import Template

WANTED = (
    'wanted {"prompt": ..., "chosen": ..., "rejected": ...}, {"prompt": ..., "answers": [...]} from the best to the '
    "worst, each a text or messages, or chosen and rejected as whole conversations"
)

Rendered = tuple[Sequence[int], Sequence[int]]
"""The ids of a prompt and its answer, and 1 for each that the assistant writes in the answer."""


class Preference(NamedTuple):
    """The messages before the answers, ending with the user's, and the answers, the best first: at least two."""

    prompt: Messages
    answers: list[Messages]
    ranks: list[int]
    """0 for the best answer; equal ones for answers of which none is preferred."""


def preference_of(record: Any, origin: str) -> Preference:
    """The preference of a record, in the forms that Hugging Face's datasets have; see WANTED.

    Raises InputError, which names `origin`, for another form, a prompt that does not end with the user, an answer that
    is none of the assistant's, equal answers, and `ranks` (lower ones for better answers, equal ones allowed) that are
    not one for each of `answers`, or all equal.
    """
    if not isinstance(record, Mapping) or not ({"chosen", "rejected"} <= record.keys() or "answers" in record):
        fields = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise InputError(f"{origin} has {fields}; {WANTED}")
    given = record["answers"] if "answers" in record else [record["chosen"], record["rejected"]]
    if not isinstance(given, list) or len(given) < 2:
        raise InputError(f"{origin}: answers has {given!r:.80}; wanted at least two, from the best to the worst")
    answers = [_messages(answer, "assistant", f"{origin}: answer {i + 1}") for i, answer in enumerate(given)]
    if record.get("prompt") is None:  # whole conversations: what they begin with is the prompt
        shortest = min(map(len, answers)) - 1
        same = next((i for i in range(shortest) if any(a[i] != answers[0][i] for a in answers)), shortest)
        prompt, answers = answers[0][:same], [answer[same:] for answer in answers]
    else:
        prompt = _messages(record["prompt"], "user", f"{origin}: prompt")
    if not prompt or prompt[-1]["role"] != "user":
        last = prompt[-1]["role"] if prompt else "nothing"
        raise InputError(f"{origin}: the prompt ends with {last}; wanted a message of the user, which is answered")
    refuse_images(record, [*prompt, *(message for answer in answers for message in answer)], origin)
    for i, answer in enumerate(answers):
        if not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise InputError(f"{origin}: answer {i + 1} is not the assistant's; {WANTED}")
        if answer in answers[:i]:
            raise InputError(
                f"{origin}: answers {answers.index(answer) + 1} and {i + 1} are equal: nothing is preferred"
            )
    ranks = record.get("ranks") if "answers" in record else None
    if ranks is None:
        return Preference(prompt, answers, list(range(len(answers))))
    numbers = isinstance(ranks, list) and all(type(r) in (int, float) and math.isfinite(r) for r in ranks)
    if not numbers or len(ranks) != len(answers) or len({*ranks}) < 2:
        raise InputError(
            f"{origin}: ranks is {one_line(repr(ranks), 60)}; wanted {len(answers)} numbers, one an answer, lower for "
            "better, at least two of them different"
        )
    places = {rank: place for place, rank in enumerate(sorted({*ranks}))}
    order = sorted(range(len(answers)), key=lambda i: ranks[i])
    return Preference(prompt, [answers[i] for i in order], [places[ranks[i]] for i in order])


def _messages(value: Any, role: str, origin: str) -> Messages:
    """A text as one message, or messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of({"messages": value}, origin)


def read_preferences(path: Path) -> Iterator[Preference]:
    """Yields the preference of each record of a file; raises InputError, which names the file and the line or row."""
    for origin, record in read_records(path):
        yield preference_of(record, origin)


def render_answers(template: Template, tokenizer: Tokenizer, preference: Preference) -> list[Rendered]:
    """Ids and weights of each answer behind the prompt; 1 where the assistant writes the answer, its end included."""
    before, _ = template.render(tokenizer, preference.prompt, add_generation_prompt=True)
    rendered: list[Rendered] = []
    for answer in preference.answers:
        ids, weights = template.render(tokenizer, [*preference.prompt, *answer])
        rendered.append((ids, [0] * len(before) + weights[len(before) :]))
    return rendered


class RankedAnswers(NamedTuple):
    """A prompt's answers as rendered, the best first, and their ranks: see `Preference`."""

    answers: list[Rendered]
    ranks: list[int]


class PromptRows:
    """Batches of prompts with all their answers, in another order each epoch.

    A subclass says which prompts fit, and lays them out. Those that do not are left out and counted in `too_long`;
    raises InputError where none fits.
    """

    def __init__(self, prompts: Sequence[RankedAnswers], length: int, seed: int = 0):
        self.length, self.seed = length, seed
        self.prompts = [prompt for prompt in prompts if self.fits(prompt)]
        self.too_long = len(prompts) - len(self.prompts)
        self.num_answers = max((len(prompt.ranks) for prompt in self.prompts), default=0)
        if not self.prompts:
            raise InputError(
                f"none of {len(prompts)} preferences fits into rows of data.length = {length} tokens; raise "
                "--data.length"
            )

    def fits(self, prompt: RankedAnswers) -> bool:
        """True for a prompt all of whose answers have room."""
        raise NotImplementedError

    def lay_out(self, prompts: Sequence[RankedAnswers | None]) -> Batch:
        """A batch of these prompts; None is a row of padding."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Prompts of an epoch."""
        return len(self.prompts)

    def batch(self, first: int, count: int) -> Batch:
        """Prompts [first, first + count) of all epochs' prompts, one epoch after the other: see `lay_out`."""
        return self.lay_out([self.prompts[i] for i in shuffled(first, count, self.num_rows, self.seed)])

    def in_order(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Yields each prompt once, or the first max_rows (0: all), in batches of which the last one is padded."""
        prompts = self.prompts[: max_rows or None]
        for first in range(0, len(prompts), batch_size):
            some = prompts[first : first + batch_size]
            yield self.lay_out([*some, *[None] * (batch_size - len(some))])


class PreferenceRows(PromptRows):
    """Prompts whose answers each have a row of their own, behind the prompt."""

    def fits(self, prompt: RankedAnswers) -> bool:
        return max(len(ids) for ids, _ in prompt.answers) <= self.length + 1

    def lay_out(self, prompts: Sequence[RankedAnswers | None]) -> Batch:
        """inputs_BSL, targets_BSL, positions_BSL, segments_BSL and weights_BSL as packing.cut has them.

        S are the answers from the best to the worst, with their ranks in rank_BS; a prompt with fewer than others has
        rows of padding, and 0 in answers_BS.
        """
        shape = len(prompts), self.num_answers
        batch: Batch = {
            f"{name[:-2]}BSL": np.zeros((*shape, self.length), x.dtype) for name, x in example_batch(1, 1).items()
        }
        batch |= {"rank_BS": np.zeros(shape, np.int32), "answers_BS": np.zeros(shape, np.float32)}
        for row, prompt in enumerate(prompts):
            if prompt is None:
                continue
            count = len(prompt.ranks)
            for name, x in pad_documents([ids for ids, _ in prompt.answers], self.length).items():
                batch[f"{name[:-2]}BSL"][row, :count] = x
            for answer, (_, weights) in enumerate(prompt.answers):
                batch["weights_BSL"][row, answer, : len(weights) - 1] *= weights[1:]
            batch["rank_BS"][row, :count], batch["answers_BS"][row, :count] = prompt.ranks, 1
        return batch


MOST_SHARED = 2048
"""Tokens of a row beyond which prompts are not shared: a tree's attention holds all scores of a row."""


def shares_prompts(model: ModelConfig, length: int) -> bool:
    """True where the answers of a prompt stand behind it in one row, as a tree whose attention is not too large."""
    return length <= MOST_SHARED and keeps_branches(model, length)


def keeps_branches(model: ModelConfig, length: int) -> bool:
    """True where texts that begin alike can share their beginning in a row, as a tree.

    A block of the user's own may look at its neighbours, and by place a text is further from its beginning than by
    position: a window would hide what it should not.
    """
    return not model.block and all(window is None or length <= window for window in model.layer_windows)


class AnswerTrees(PromptRows):
    """Prompts that have one row each, with all their answers.

    With `share` the prompt stands there once, and behind it the answers, none of which sees another; else each answer
    is a document of the row behind a prompt of its own. An answer ends with the last token that the assistant writes,
    which is where a model has read all of it.
    """

    def __init__(self, prompts: Sequence[RankedAnswers], length: int, seed: int, share: bool):
        self.share = share
        super().__init__(prompts, length, seed)

    def fits(self, prompt: RankedAnswers) -> bool:
        return self.size(prompt)[0] <= self.length

    def size(self, prompt: RankedAnswers) -> tuple[int, int]:
        """Tokens of its row, and of its answers with a prompt each."""
        answers = [written(answer) for answer in prompt.answers]
        every = sum(map(len, answers))
        return every - (len(answers) - 1) * common_prefix(answers) * self.share, every

    def best(self, count: int) -> list[np.ndarray]:
        """The ids of the best answers, one or several a prompt, of the first `count` prompts of the first epoch."""
        prompts = [self.prompts[n] for n in shuffled(0, min(count, self.num_rows), self.num_rows, self.seed)]
        return [written(a) for prompt in prompts for a, rank in zip(prompt.answers, prompt.ranks) if rank == 0]

    def lay_out(self, prompts: Sequence[RankedAnswers | None]) -> Batch:
        """inputs_BL, positions_BL and segments_BL int32: a shared prompt is segment 1, each answer one of its own.

        With `share` until_BL, as `ops.reference.tree` reads it. Of the S answers, the best first, ends_BS is the place
        of the last token, rank_BS the rank, and mask_BS 1 where there is one.
        """
        shape, places = (len(prompts), self.length), (len(prompts), self.num_answers)
        names = ("inputs_BL", "positions_BL", "segments_BL", *(["until_BL"] if self.share else []))
        batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
        batch |= {name: np.zeros(places, np.int32) for name in ("ends_BS", "rank_BS")}
        batch["mask_BS"] = np.zeros(places, np.float32)
        if self.share:
            batch["until_BL"][:] = self.length  # of padding
        for row, prompt in enumerate(prompts):
            if prompt is not None:
                self._fill({name: x[row] for name, x in batch.items()}, prompt)
        return batch

    def _fill(self, row: Batch, prompt: RankedAnswers) -> None:
        answers = [written(answer) for answer in prompt.answers]
        shared = common_prefix(answers) if self.share else 0
        row["inputs_BL"][:shared] = answers[0][:shared]
        row["positions_BL"][:shared] = np.arange(shared)
        row["segments_BL"][:shared] = 1
        at = shared
        for answer, ids in enumerate(answers):
            here = slice(at, at + len(ids) - shared)
            row["inputs_BL"][here] = ids[shared:]
            row["positions_BL"][here] = np.arange(shared, len(ids))
            row["segments_BL"][here] = answer + 1 + (shared > 0)
            at = here.stop
            row["ends_BS"][answer] = at - 1
            if self.share:
                row["until_BL"][here] = at
        if self.share:
            row["until_BL"][:shared] = at
        row["rank_BS"][: len(answers)], row["mask_BS"][: len(answers)] = prompt.ranks, 1


def written(answer: Rendered) -> np.ndarray:
    """The ids of an answer and its prompt, up to the last one that the assistant writes."""
    ids, weights = answer
    last = max((i for i, weight in enumerate(weights) if weight), default=len(ids) - 1)
    return np.array(ids[: last + 1], np.int32)


def common_prefix(answers: Sequence[np.ndarray]) -> int:
    """Tokens with which all begin; the last token of each is its own."""
    most = min(map(len, answers)) - 1
    same = np.all([ids[:most] == answers[0][:most] for ids in answers], axis=0)
    return most if same.all() else int(same.argmin())

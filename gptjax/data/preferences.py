"""Preferences: answers to one prompt from the best to the worst, read, rendered by a template, and laid out in rows.

A row is one answer behind its prompt, padded; the answers of a prompt stay together. None is cut: a prompt of which an
answer does not fit is left out and counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.section import InputError
from gptjax.data.dialogue import Messages, messages_of
from gptjax.data.formats import read_records
from gptjax.data.packing import Batch, pad_documents
from gptjax.data.permutation import shuffled
from gptjax.tokenizer.interface import Tokenizer
from gptjax.tokenizer.templates import Template

WANTED = (
    'wanted {"prompt": ..., "chosen": ..., "rejected": ...}, {"prompt": ..., "answers": [...]} from the best to the '
    "worst, each a text or messages, or chosen and rejected as whole conversations"
)


class Preference(NamedTuple):
    """The messages before the answers, ending with the user's, and the answers, the best first: at least two."""

    prompt: Messages
    answers: list[Messages]


def preference_of(record: Any, origin: str) -> Preference:
    """The preference of a record, in the forms that Hugging Face's datasets have; see WANTED.

    Raises InputError, which names `origin`, for another form, a prompt that does not end with the user, an answer that
    is none of the assistant's, and equal answers.
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
    for i, answer in enumerate(answers):
        if not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise InputError(f"{origin}: answer {i + 1} is not the assistant's; {WANTED}")
        if answer in answers[:i]:
            raise InputError(
                f"{origin}: answers {answers.index(answer) + 1} and {i + 1} are equal: nothing is preferred"
            )
    return Preference(prompt, answers)


def _messages(value: Any, role: str, origin: str) -> Messages:
    """A text as one message, or messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of({"messages": value}, origin)


def read_preferences(path: Path) -> Iterator[Preference]:
    """Yields the preference of each record of a file; raises InputError, which names the file and the line or row."""
    for origin, record in read_records(path):
        yield preference_of(record, origin)


def render_answers(
    template: Template, tokenizer: Tokenizer, preference: Preference
) -> list[tuple[list[int], list[int]]]:
    """Ids and weights of each answer behind the prompt; 1 where the assistant writes the answer, its end included."""
    before, _ = template.render(tokenizer, preference.prompt, add_generation_prompt=True)
    rendered = []
    for answer in preference.answers:
        ids, weights = template.render(tokenizer, [*preference.prompt, *answer])
        rendered.append((ids, [0] * len(before) + weights[len(before) :]))
    return rendered


class PreferenceRows:
    """Batches of prompts with all their answers, in another order each epoch.

    `rendered` holds for each prompt what `render_answers` gives. Prompts of which an answer has more than length + 1
    ids are left out and counted in `too_long`. Raises InputError where nothing is left.
    """

    def __init__(self, rendered: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], length: int, seed: int = 0):
        self._prompts = [answers for answers in rendered if max(len(ids) for ids, _ in answers) <= length + 1]
        self.length, self.seed, self.too_long = length, seed, len(rendered) - len(self._prompts)
        self.num_answers = max(map(len, self._prompts), default=0)
        if not self._prompts:
            raise InputError(
                f"none of {len(rendered)} preferences fits: an answer of each has more than data.length + 1 = "
                f"{length + 1} tokens with its prompt; raise --data.length"
            )

    @property
    def num_rows(self) -> int:
        """Prompts of an epoch."""
        return len(self._prompts)

    def batch(self, first: int, count: int) -> Batch:
        """Prompts [first, first + count) of all epochs' prompts, one epoch after the other.

        inputs_BSL, targets_BSL, positions_BSL, segments_BSL and weights_BSL as packing.cut has them, S the answers from
        the best to the worst; a prompt with fewer than others has rows of padding, and 0 in answers_BS.
        """
        batch: dict[str, list[np.ndarray]] = {}
        for number in shuffled(first, count, self.num_rows, self.seed):
            answers = self._prompts[number]
            rows = pad_documents([ids for ids, _ in answers], self.length)
            for row, (_, weights) in enumerate(answers):
                rows["weights_BL"][row, : len(weights) - 1] *= weights[1:]
            room = self.num_answers - len(answers)
            for name, x in rows.items():
                batch.setdefault(f"{name[:-2]}BSL", []).append(np.pad(x, ((0, room), (0, 0))))
            batch.setdefault("answers_BS", []).append(np.arange(self.num_answers) < len(answers))
        return {
            name: np.stack(x).astype(np.float32 if name == "answers_BS" else x[0].dtype) for name, x in batch.items()
        }

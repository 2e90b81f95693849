"""Prompts as the data of a run that draws its answers itself: rendered, a share of them held out, ordered by the seed.

A record has "prompt", a text or messages, and whatever a reward needs beside it. A tokenizer with a chat template
answers prompts as messages of a user; without one a prompt is text to go on with, and messages are refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import PolicyConfig
from gptjax.config.section import InputError, one_line
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice
from gptjax.data.dialogue import messages_of
from gptjax.data.formats import read_records
from gptjax.data.holdout import unit_hash
from gptjax.data.image_messages import refuse_images
from gptjax.data.packing import Batch
from gptjax.data.permutation import shuffled
from gptjax.data.rendered import RecordData, held_out, record_files, tuned_tokenizer
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of

WANTED = 'wanted {"prompt": a text, or messages of which the last is the user\'s}, with whatever a reward reads'


class Prompt(NamedTuple):
    """A prompt as it is answered."""

    ids: Sequence[int]
    record: Mapping[str, Any]
    """The record that it comes from, "prompt" among its fields."""
    origin: str
    """The place of the record, for messages."""

    @property
    def text(self) -> str:
        """The prompt, or its last message, as text."""
        given = self.record["prompt"]
        return given if isinstance(given, str) else given[-1]["content"]


def prompt_of(record: Any, origin: str, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a record, rendered; raises InputError, which names `origin`, for another form."""
    if not isinstance(record, Mapping) or not isinstance(record.get("prompt"), str | list):
        fields = f"the fields {', '.join(map(str, record))}" if isinstance(record, Mapping) else repr(record)
        raise InputError(f"{origin} has {one_line(fields, 120)}; {WANTED}")
    given: str | list = record["prompt"]
    asked = [{"role": "user", "content": given}] if isinstance(given, str) else messages_of({"messages": given}, origin)
    if not asked or asked[-1]["role"] != "user":
        raise InputError(f"{origin}: the prompt ends with {asked[-1]['role'] if asked else 'nothing'}; {WANTED}")
    refuse_images(record, asked, origin)
    try:
        if tokenizer.template:
            ids, _ = template_of(tokenizer).render(tokenizer, asked, add_generation_prompt=True)
        elif isinstance(given, str):
            ids = tokenizer.prompt_ids(given)
        else:
            raise InputError(
                "its prompt has messages, and the tokenizer no chat template; name one with --tokenizer.template"
            )
    except InputError as e:
        raise InputError(f"{origin}: {e}") from e
    return Prompt(ids, record if isinstance(given, str) else {**record, "prompt": asked}, origin)


class PromptData(RecordData):
    """The prompts of a source, to draw answers to and held out, with the methods of a pipeline's data.

    A prompt is held out by a hash of its text, so that equal prompts stay together and the order of the file does not
    matter. `folder` is the run's; its tokenizer lies beside it once it was begun. Prompts that leave no room for the
    longest answer in a row are left out, and counted in `too_long`. Raises InputError for records of another form, and
    where there is nothing to answer or to hold out.
    """

    def __init__(self, config: PolicyConfig, folder: Path, training: bool):
        super().__init__(config, tuned_tokenizer(config, folder.with_name("tokenizer")), training)
        self._rollout = rollout = config.rollout
        source = config.data.source
        prompts = [
            prompt_of(record, origin, self.tokenizer)
            for path in record_files(source, "prompts")
            for origin, record in read_records(path)
        ]
        self.most = config.data.length - rollout.max_new_tokens
        hashes = np.array([_hash(prompt) for prompt in prompts])
        usable = np.array([len(prompt.ids) <= self.most for prompt in prompts], bool)
        self.too_long = len(prompts) - int(usable.sum())
        if len(np.unique(hashes[usable])) < 2:
            raise InputError(
                f"data.source={source!r}: {int(usable.sum())} of {len(prompts)} prompts leave room for "
                f"rollout.max_new_tokens={rollout.max_new_tokens} in data.length={config.data.length}; wanted at least "
                "two different ones, one to hold out"
            )
        held = held_out(hashes, usable, config.data.validation_fraction, source)
        self.train, self.held = (
            [p for p, fits, h in zip(prompts, usable, held, strict=True) if fits and h == side]
            for side in (False, True)
        )
        self.longest = max(len(prompt.ids) for prompt in (*self.train, *self.held))
        """Tokens of the longest prompt."""
        self.begin(
            json.dumps([list(prompt.ids), prompt.record], sort_keys=True, default=str).encode() for prompt in prompts
        )

    @property
    def epoch_rows(self) -> int:
        """The answers of an epoch, of which data.batch_size make a step."""
        return len(self.train) * self._rollout.answers

    def prompts(self, first: int, count: int) -> list[Prompt]:
        """Prompts [first, first + count) of all epochs' prompts, each epoch in another order."""
        return [self.train[i] for i in shuffled(first, count, len(self.train), self.config.seed)]

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The prompts of the step that begins with row `first`, each as often as it is answered: inputs_BL ..., padded.

        Nothing is a target: what follows a prompt is drawn when its step is made.
        """
        answers, rows = self._rollout.answers, self.config.data.batch_size
        shape = rows, self.config.data.length
        batch: Batch = {
            n: np.zeros(shape, np.int32) for n in ("inputs_BL", "targets_BL", "positions_BL", "segments_BL")
        }
        for i, prompt in enumerate(self.prompts(first // answers, rows // answers)):
            of = slice(i * answers, (i + 1) * answers), slice(len(prompt.ids))
            batch["inputs_BL"][of], batch["segments_BL"][of] = prompt.ids, 1
            batch["positions_BL"][of] = np.arange(len(prompt.ids))
        return {n: x[part] for n, x in batch.items()} | {"weights_BL": np.zeros(shape, np.float32)[part]}

    def batches(self, state: DataState, part: RowSlice = ALL_ROWS):
        """None: answers are drawn from the weights of the moment (`align.rollout`)."""
        raise NotImplementedError("answers are drawn from the weights of the moment")

    def describe(self) -> str:
        """The numbers of prompts, and of those that were left out, in a line."""
        left = f"; left out: {self.too_long:,} of more than {self.most:,} tokens" if self.too_long else ""
        return (
            f"{len(self.train):,} prompts to answer, of at most {self.longest:,} tokens, {len(self.held):,} held out"
            f"{left}; {self.passes}"
        )


def _hash(prompt: Prompt) -> float:
    text = json.dumps(prompt.record["prompt"], sort_keys=True, default=str)
    return unit_hash(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())

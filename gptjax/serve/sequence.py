"""A sequence: a prompt that a server answers, by settings of its own, and the news of it."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.generation.constraint import Constraint
from gptjax.generation.image_places import NO_PICTURES, Pictures, check_images
from gptjax.generation.text_stream import TextStream
from gptjax.serve.engine import STOPS, TOP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """A request's own settings: those of `gptjax generate`, and what the OpenAI API has beside them."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    """Taken from the logit of each id that the answer holds."""
    frequency_penalty: float = 0.0
    """The same, for each time that it holds it."""
    seed: int = 0
    copy: int = 0
    """Number of an answer among several of one prompt: each has random numbers of its own."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)


class Token(NamedTuple):
    """A token of an answer, or of a prompt: its log-probability by the model itself (temperature 1), in nats."""

    id: int
    log_p: float
    top: list[tuple[int, float]]
    """The likeliest ids with theirs, as many as were asked for."""


class Update(NamedTuple):
    """News of a sequence."""

    tokens: list[Token]
    text: str
    """What they make certain: no part of a character, nothing of a stop text."""
    finish: str
    """Empty while it goes on; then "stop", "length", "cancelled" or "error"."""


class Busy(Exception):
    """No place is left to wait in, or (`ended`) the scheduler takes no more; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float, *, ended: bool = False):
        super().__init__(message)
        self.retry_after, self.ended = retry_after, ended


class Sequence:
    """A prompt that is answered: as many of these as answers.

    `on_update` is called on the scheduler's thread with each Update; the last one has `finish`. With max_new_tokens=0
    the prompt is only read. `text` makes text of the ids and knows the stop texts; `stop_ids` end the answer and are no
    part of it. `pictures` are the images whose ids stand in the prompt.
    """

    def __init__(
        self,
        ids: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: list[int],
        text: TextStream,
        on_update: Callable[[Update], None],
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        embed: bool = False,
        constraint: Constraint | None = None,
        pictures: Pictures = NO_PICTURES,
    ):
        self.ids, self.max_new_tokens, self.sampling = list(ids), max_new_tokens, sampling
        self.stop_ids, self.text, self.on_update = tuple(stop_ids), text, on_update
        self.top_logprobs, self.prompt_logprobs, self.embed = top_logprobs, prompt_logprobs, embed
        self.constraint, self.pictures = constraint, pictures
        self.prompt_tokens: list[Token | None] = []
        """Where prompt_logprobs: None for the first id, then a Token for each."""
        self.embedding: np.ndarray | None = None
        """Where embed: the mean of the final hidden states, of length 1."""
        self.reused = 0
        """Tokens of the prompt that another row, or this one before, had read."""
        self.generated = 0
        self.error = ""
        self.cancelled = False
        self.allowed_from: Any = None
        self.hidden_sum: Any = 0.0
        self.read = 0
        self.ends: list[int] = []

    @property
    def to_read(self) -> list[int]:
        """The ids that a prefill reads: all but the last, which the first step of the decode loop takes."""
        return self.ids if self.embed or not self.max_new_tokens else self.ids[:-1]


@dataclasses.dataclass
class Stats:
    """Counters since the start, and how things stand."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefills: int = 0
    prefill_seconds: float = 0.0
    decode_chunks: int = 0
    decode_seconds: float = 0.0
    finished: Counter = dataclasses.field(default_factory=Counter)
    """Sequences by how they ended."""
    running: int = 0
    waiting: int = 0
    slots: int = 0
    failed: int = 0
    """Calls of the device that failed since the last one that did not."""


def check_sequence(sequence: Sequence, context: int, vocab_size: int, vision: VisionConfig) -> None:
    """Raises InputError where a sequence can't be answered within `context` tokens."""
    size, wanted, sampling = len(sequence.ids), sequence.max_new_tokens, sequence.sampling
    if not size:
        raise InputError("the prompt has no tokens; wanted at least one, such as the one that begins a document")
    if size + wanted > context:
        raise InputError(
            f"the prompt has {size:,} tokens and the answer may have {wanted:,}; wanted at most {context:,} together; "
            "shorten the prompt, or ask for fewer"
        )
    if sequence.pictures:
        check_images(sequence.ids, sequence.pictures, vision, "the prompt")
    texts = [i for i in sequence.ids if i not in sequence.pictures]
    for name, ids in (("the prompt", texts), ("logit_bias", sampling.logit_bias)):
        if (wrong := next((i for i in ids if not 0 <= i < vocab_size), None)) is not None:
            raise InputError(f"{name} holds token id {wrong}; wanted 0 to {vocab_size - 1}")
    if len(sequence.stop_ids) > STOPS:
        raise InputError(f"{len(sequence.stop_ids)} ids end the answer; wanted at most {STOPS}")
    if not 0 <= sequence.top_logprobs <= TOP:
        raise InputError(f"top_logprobs={sequence.top_logprobs}: wanted 0 to {TOP}")

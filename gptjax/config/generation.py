"""Settings of text generation."""

import math
from dataclasses import dataclass
from typing import ClassVar

from gptjax.config.section import Section


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Continue a prompt."""

    section: ClassVar[str] = "generate"

    prompt: tuple[str, ...] = ("",)
    """Text to continue; several are decoded as one batch, and an empty one starts a new document."""
    max_new_tokens: int = 200
    """Tokens to add at the most."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample only from this many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample only from tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely (CTRL's penalty)."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not printed."""
    seed: int = 0
    """Seed of sampling; the same seed gives the same text, whatever else is in the batch."""

    def __post_init__(self):
        self.require(bool(self.prompt), "prompt", "at least one prompt")
        self.require_positive("max_new_tokens", "repetition_penalty")
        self.require_numbers(0, math.inf, "temperature", "top_k")
        self.require_numbers(0, 2**32 - 1, "seed")  # jax would drop higher bits
        self.require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self.require_numbers(0, 1, "min_p")
        self.require(all(self.stop), "stop", "texts that are not empty")


@dataclass(frozen=True, kw_only=True)
class ContinueConfig(GenerateConfig):
    """Continue prompts with a trained run."""

    section: ClassVar[str] = ""

    image: tuple[str, ...] = ()
    """Pictures (PNG, JPEG, WebP, GIF) in front of each prompt, for a run that reads images."""
    step: int = 0
    """Checkpoint to use; 0: the newest."""
    chat: bool = False
    """Answer each prompt as a message of a user, through the run's chat template; the answers alone are printed."""
    system: str = ""
    """System message in front of each message; empty: the template's own, where it has one."""
    template: str = ""
    """Chat template to use instead of the run's."""
    shots: str = ""
    """Examples in front of each prompt: a JSONL file, or translation, questions, sentiment or summary; the answers are
    printed alone."""
    choices: tuple[str, ...] = ()
    """Texts of which the model writes one."""
    json_schema: str = ""
    """File with a JSON schema, which the model's text fits; {"type": "json_object"}: any object."""

    def __post_init__(self):
        super().__post_init__()
        self.require(not (self.shots and self.chat), "shots", "none with --chat")
        self.require(not self.shots or all(self.prompt), "prompt", "an input with --shots", "add --prompt")
        self.require(not (self.shots and self.image), "image", "none with --shots")
        self.require(not self.image or all(self.prompt), "prompt", "a text with --image", "add --prompt")
        self.require(all(self.choices), "choices", "texts that are not empty")
        self.require(not (self.choices and self.json_schema), "json_schema", "none beside --choices")
        for name in ("system", "template"):
            self.require(self.chat or not getattr(self, name), name, "none without --chat")
        self.require(not self.chat or all(self.prompt), "prompt", "a message with --chat", "add --prompt")
        self.require_numbers(0, math.inf, "step")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Section):
    """Talk to a run in the terminal; one that was never tuned to answer goes on with a transcript."""

    section: ClassVar[str] = ""

    image: tuple[str, ...] = ()
    """Pictures (PNG, JPEG, WebP, GIF) before the first message, for a run that reads images."""
    system: str = ""
    """System message; empty: the template's own, where it has one."""
    template: str = ""
    """Chat template to use instead of the run's."""
    tools: str = ""
    """Tools that the model may call, divided by commas: calculator, search:FOLDER, or module:function of your own."""
    max_calls: int = 8
    """Calls of tools that an answer may make."""
    step: int = 0
    """Checkpoint to use; 0: the newest."""
    max_new_tokens: int = 500
    """Tokens of an answer at the most."""
    temperature: float = 0.7
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample only from this many likeliest tokens; 0: from all."""
    top_p: float = 0.95
    """Sample only from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample only from tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely (CTRL's penalty)."""
    seed: int = 0
    """Seed of sampling; the same seed and messages give the same answers."""

    def __post_init__(self):
        self.require_numbers(0, math.inf, "step", "max_calls")
        GenerateConfig(**{name: getattr(self, name) for name in SAMPLING})  # raises InputError for a bad one


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Section):
    """Look inside a run: how it gets from a text to the next token."""

    image: tuple[str, ...] = ()
    """Pictures (PNG, JPEG, WebP, GIF) in front of the text, for a run that reads images."""
    chat: bool = False
    """The text is a message of a user, in the run's chat template; else a text that goes on."""
    out: str = "inspect.html"
    """Page to write, one file that loads nothing; empty: none."""
    json: str = ""
    """File for all numbers, as JSON; empty: none."""
    step: int = 0
    """Checkpoint to use; 0: the newest."""

    def __post_init__(self):
        self.require_numbers(0, math.inf, "step")


SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Names of the settings by which an answer is sampled, in GenerateConfig and in ChatConfig."""

"""A conversation with a model: its messages, what of them fits into the context, and the answer to the last one."""

import base64
import dataclasses
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from gptjax.config import GenerateConfig
from gptjax.config.section import InputError
from gptjax.data.images import Picture
from gptjax.generation.engine import stream_text
from gptjax.generation.image_places import Pictures, require_vision
from gptjax.generation.image_prompts import ImagePrompt, reading_once, rendered_prompt, with_pictures
from gptjax.generation.text_stream import TextStream
from gptjax.runs.load import LoadedModel
from gptjax.serve.tools import Toolbox, check_template
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of
from gptjax.tokenizer.templates import Message, Template
from gptjax.tokenizer.tool_calls import ToolCall, begins_call, parse_calls

CHUNK = 4  # tokens of an answer that come at once
IMAGE_KINDS = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp", b"GIF": "gif"}  # by their first bytes
LEAST_ANSWER = 4  # an answer has at least this share of the context, 1 / LEAST_ANSWER, before messages are left out


class Renderer(Protocol):
    """Messages as the ids that a model goes on from, and the end of its answer: a chat template, or a transcript."""

    def render(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]: ...

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]: ...

    def spaced(self, tokenizer: Tokenizer) -> bool: ...


class Transcript:
    """A conversation as plain text behind an example, for models that were never tuned to answer."""

    NAMES = {"user": "User", "assistant": "Assistant"}
    STOP = ("\nUser:",)
    SYSTEM = "Below is a conversation between a user and an assistant, who gives short, true and helpful answers."
    EXAMPLE = (("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris."))

    def render(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids of the text up to where an answer begins, and a weight of 0 for each."""
        del add_generation_prompt  # nobody is trained on a transcript
        if any(not isinstance(m["content"], str) for m in messages):
            raise InputError("a model without a chat template reads no images in a conversation; see --template")
        system = next((m["content"] for m in messages if m["role"] == "system"), self.SYSTEM)
        said = [*self.EXAMPLE, *((m["role"], m["content"]) for m in messages if m["role"] != "system")]
        lines = "\n".join(f"{self.NAMES[role]}: {text.strip()}" for role, text in said)
        ids = tokenizer.prompt_ids(f"{system}\n\n{lines}\nAssistant:")
        return ids, [0] * len(ids)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end any text; the answer ends at STOP, too."""
        return tokenizer.end_ids

    def spaced(self, tokenizer: Tokenizer) -> bool:
        """True: a space stands behind the colon."""
        return True


def renderer_of(tokenizer: Tokenizer) -> Renderer:
    """The tokenizer's chat template, or a transcript where it has none."""
    return template_of(tokenizer) if tokenizer.template else Transcript()


class Prepared(NamedTuple):
    """A conversation that is ready to be answered."""

    ids: list[int]
    left_out: int
    """Messages from the start that do not fit, and are not read."""
    room: int
    """Tokens that an answer may have."""
    pictures: Pictures
    """The images whose ids are among the ids."""


class Session:
    """A conversation with a loaded model, kept as messages of the user and the assistant.

    The system message stands before them and is never left out; `settings` are those of sampling, of which `prompt` is
    not read. An answer is a function of the messages, the settings and how often it was asked for again. With a toolbox
    the model is told of its tools, and the calls in an answer, at most `max_calls`, are made before it goes on.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        settings: GenerateConfig,
        system: str = "",
        toolbox: Toolbox | None = None,
        max_calls: int = 8,
    ):
        self.model, self.tokenizer, self.settings, self.system = model, tokenizer, settings, system
        self.toolbox, self.max_calls = toolbox, max_calls
        self.noted: Callable[[ToolCall, str], None] = lambda call, result: None
        """Called behind each call of a tool, with its result."""
        if toolbox:
            check_template(tokenizer)
        self.renderer = renderer_of(tokenizer)
        self._stop = () if tokenizer.template else Transcript.STOP
        self.messages: list[dict[str, Any]] = []
        self.left_out = 0
        """Messages from the start that the last answer was given without, since they do not fit."""
        self._again = 0
        self._pictures: list[Picture] = []
        self._read = reading_once()

    def add_picture(self, picture: Picture) -> int:
        """Puts a picture before the next message; returns the tokens that it takes.

        Raises InputError where it can't be read, and for a model or a template that has no place for it.
        """
        vision = self.model.decoder.cfg.vision
        require_vision(vision)
        self.renderer.render(self.tokenizer, [{"role": "user", "content": with_pictures("x", [picture])}])
        self._read(picture, vision)
        self._pictures.append(picture)
        return vision.tokens_around

    def prepare(self) -> Prepared:
        """The messages as ids, the oldest turns left out where all do not fit.

        Raises InputError where the last message does not fit by itself, or is no message that can be answered.
        """
        context = self.model.decoder.context
        least = min(self.settings.max_new_tokens, max(1, context // LEAST_ANSWER))
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        for first in turns:
            prompt = self._render(first, add_generation_prompt=True)
            ids = prompt.ids
            if len(ids) + least <= context:
                room = min(self.settings.max_new_tokens, context - len(ids))
                return Prepared(ids, first, room, prompt.pictures)
        if not turns:
            raise InputError("there is no message to answer yet")
        raise InputError(
            f"the message has {len(ids):,} tokens with what stands around it; wanted at most {context - least:,}, "
            f"since the model reads {context:,} and an answer needs {least:,}; shorten it"
        )

    def ask(self, text: str) -> Iterator[str]:
        """Adds a message of the user, and yields the answer in pieces; it is kept as far as it came.

        The pictures that were added stand before its text. Raises InputError, with the conversation as it was, where
        the message does not fit.
        """
        self.messages.append({"role": "user", "content": with_pictures(text, self._pictures)})
        self._again = 0
        try:
            prepared = self.prepare()
        except InputError:
            self.messages.pop()
            raise
        self.left_out, self._pictures = prepared.left_out, []
        return self._answer(prepared)

    def retry(self) -> Iterator[str]:
        """Takes the last answer back and yields another one; raises InputError where there is no message."""
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        prepared = self.prepare()
        self._again, self.left_out = self._again + 1, prepared.left_out
        return self._answer(prepared)

    def undo(self) -> bool:
        """Takes back the user's last message with its answer; False where there is none."""
        if not self.messages:
            return False
        while self.messages.pop()["role"] != "user":
            pass
        return True

    def reset(self) -> None:
        """Forgets all messages and pictures; the system message stays."""
        self.messages.clear()
        self._pictures.clear()
        self._read = reading_once()

    def describe(self) -> str:
        """The tokens of the conversation, as it would be read, and of the context, in a line."""
        context = self.model.decoder.context
        if not self.messages:
            return f"no message yet; the model reads {context:,} tokens"
        asks = self.messages[-1]["role"] == "user"
        ids = self.prepare().ids if asks else self._render().ids
        return f"{len(ids):,} of {context:,} tokens in {len(self.messages)} messages"

    def _render(self, first: int = 0, add_generation_prompt: bool = False) -> ImagePrompt:
        """The conversation from a message on, behind the system message, as the model reads it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        tools = {"tools": self.toolbox.specs} if self.toolbox else {}
        messages = [*system, *self.messages[first:]]
        ids, _ = self.renderer.render(self.tokenizer, messages, add_generation_prompt, **tools)
        return rendered_prompt(ids, messages, self.model.decoder.cfg.vision, self._read)

    def save(self, path: str | Path) -> None:
        """Adds the conversation to a file as a line of JSON, its pictures in it, in the form that fine-tuning reads."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [{**message, "content": _saved(message["content"])} for message in self.messages]
        record = {"messages": [*system, *messages], **({"tools": self.toolbox.specs} if self.toolbox else {})}
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as e:
            raise InputError(f"{path} can't be written ({e.strerror or e}); give another file") from e

    def load(self, messages: Sequence[Message]) -> None:
        """Goes on with other messages, of which a first one of the system becomes the system message."""
        kept = [dict(message) for message in messages]
        if kept and kept[0]["role"] == "system":
            self.system = kept.pop(0)["content"]
        self.messages, self._again = kept, 0

    def _answer(self, prepared: Prepared) -> Iterator[str]:
        calls, made = (yield from self._turn(prepared, self.toolbox is not None)), 0
        while calls and self.toolbox:
            if self.messages[-1]["content"]:
                yield "\n\n"
            for call in calls:
                made += 1
                result = f"error: an answer makes at most {self.max_calls} calls; answer without"
                if made <= self.max_calls:
                    result = self.toolbox.call(call.name, call.arguments)
                self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
                self.noted(call, result)
            calls = yield from self._turn(self.prepare(), made <= self.max_calls)

    def _turn(self, prepared: Prepared, with_calls: bool) -> Generator[str, None, list[ToolCall]]:
        """Yields what the model says, adds it to the messages, and returns its calls, which are not yielded."""
        seed = (self.settings.seed + self._again) % 2**32
        cfg = dataclasses.replace(self.settings, max_new_tokens=prepared.room, seed=seed)
        renderer, stops = self.renderer, self.renderer.stop_ids(self.tokenizer)
        marks = renderer.marks(self.tokenizer) if isinstance(renderer, Template) and self.toolbox else {}
        spaced = renderer.spaced(self.tokenizer)
        text = TextStream(self.tokenizer, (*cfg.stop, *self._stop), drops_space=spaced, marks=marks)
        model, said, shown, calls = self.model, "", 0, []
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        arguments: Any = (model.decoder, model.params, [prepared.ids], [text], cfg)
        try:
            with jax.set_mesh(model.mesh):
                for _, piece in stream_text(*arguments, stop_ids=stops, chunk=CHUNK, pictures=prepared.pictures):
                    said += piece
                    certain = begins_call(said) if with_calls else len(said)
                    if certain > shown:
                        shown, piece = certain, said[shown:certain]
                        yield piece
            if with_calls:
                kept, calls = parse_calls(said)
                rest = kept.removeprefix(said[:shown].strip()) if calls else said[shown:]
                if calls:
                    message["tool_calls"] = [call.as_openai() for call in calls]
                    said = kept
                if rest:
                    yield rest
        finally:  # also where the reader stops, or Ctrl-C does
            self.messages.append(message | {"content": said})
        return calls


def _saved(content: Any) -> Any:
    """The content of a message as JSON has it."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": _data_url(part["image"])}} if part["type"] == "image" else part
        for part in content
    ]


def _data_url(picture: Picture) -> str:
    kind = next(kind for begun, kind in IMAGE_KINDS.items() if picture.content.startswith(begun))
    return f"data:image/{kind};base64,{base64.b64encode(picture.content).decode()}"

"""A model that is served: conversations as ids, the scheduler that answers them, the newest checkpoint of its run."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.config.serving import ServeConfig
from gptjax.data.image_messages import pictures_of
from gptjax.data.image_reader import ImageReader
from gptjax.data.images import Picture
from gptjax.generation.engine import drawable
from gptjax.generation.image_places import require_vision
from gptjax.generation.image_prompts import ImagePrompt, rendered_prompt
from gptjax.generation.text_stream import TextStream
from gptjax.parallel.processes import working
from gptjax.runs.load import LoadedModel, load_model, open_checkpoints
from gptjax.serve.scheduler import Scheduler
from gptjax.serve.session import Transcript, renderer_of
from gptjax.serve.tools import check_template, open_tools
from gptjax.tokenizer import set_template
from gptjax.tokenizer.templates import Message, Template
from gptjax.tokenizer.tool_calls import ToolSpec

PICTURES = 64  # pictures whose patches are kept, for conversations that go on


class Service:
    """A loaded model and all that its endpoints share.

    Of a run that is still training it has the newest sound checkpoint, until `reload`.
    """

    def __init__(self, model: LoadedModel, cfg: ServeConfig, scheduler: Scheduler | None = None):
        self.model, self.cfg = model, cfg
        self.tokenizer = model.tokenizer
        set_template(self.tokenizer, cfg.template)
        self.renderer = renderer_of(self.tokenizer)
        self.toolbox = open_tools(cfg.tools) if cfg.tools else None
        if self.toolbox:
            check_template(self.tokenizer)
        self.scheduler = scheduler or Scheduler(
            model,
            slots=cfg.slots,
            context=cfg.context,
            max_waiting=cfg.max_waiting,
            prefill_chunk=cfg.prefill_chunk,
            batch_invariant=cfg.batch_invariant,
        )
        self.name = cfg.name or Path(model.run.folder).resolve().name
        self.created = int(time.time())
        self.draining = False
        self._loading, self._reading = threading.Lock(), threading.Lock()
        self._reader = ImageReader() if self.vision.patch else None
        self._pictures: dict[str, np.ndarray] = {}
        self._spaced = self.tokenizer.opens_with_space
        self._answers_spaced = self.renderer.spaced(self.tokenizer)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at the most."""
        return self.scheduler.context

    @property
    def vocab_size(self) -> int:
        """Ids that have a text, and the model reads."""
        return drawable(self.model.decoder, self.tokenizer)

    @property
    def vision(self) -> VisionConfig:
        """Settings of the images that the model reads; patch=0: none."""
        return self.model.decoder.cfg.vision

    @property
    def most_body(self) -> int:
        """Bytes of a chat's body at the most."""
        return max(self.cfg.max_body, self.cfg.max_image_body) if self.vision.patch else self.cfg.max_body

    @property
    def fingerprint(self) -> str:
        """A name of the weights: a seed gives the same text under the same one."""
        return f"step-{self.model.step}"

    @property
    def most_sequences(self) -> int:
        """Sequences of one request at the most: more could never be taken at once."""
        return self.cfg.max_waiting

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        """The messages behind the server's system message, where they bring none."""
        if self.cfg.system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.cfg.system}, *messages]
        return list(messages)

    def _patches(self, picture: Picture, vision: VisionConfig) -> np.ndarray:
        """The patches of a picture, decoded in another process; those of the last pictures are kept."""
        assert self._reader is not None, "a model that reads no images is given none"
        with self._reading:
            if (known := self._pictures.get(picture.key)) is not None:
                return known
        patches_PY = self._reader.patches(picture.content, picture.origin, vision)
        with self._reading:
            self._pictures[picture.key] = patches_PY
            while len(self._pictures) > PICTURES:
                self._pictures.pop(next(iter(self._pictures)))
        return patches_PY

    def close(self) -> None:
        """Ends the process that decodes pictures."""
        if self._reader:
            self._reader.close()

    def render(self, messages: Sequence[Message], answer: bool = True, tools: Sequence[ToolSpec] = ()) -> ImagePrompt:
        """A conversation up to where an answer begins, or without one, as the model reads it.

        `tools` are those that the model is told of. Raises InputError for a bad one, for images that can't be read, and
        for more than cfg.max_images.
        """
        conversation, renderer = self.conversation(messages), self.renderer
        if count := len(pictures_of(conversation)):
            require_vision(self.vision)
            if count > self.cfg.max_images:
                raise InputError(f"the conversation has {count} images; wanted at most {self.cfg.max_images}")
        if isinstance(renderer, Template):
            ids, _ = renderer.render(self.tokenizer, conversation, answer, tools)
            return rendered_prompt(ids, conversation, self.vision, self._patches)
        if tools:
            raise InputError("tools: this run has no chat template, in which a model is told of them; see --template")
        _check_transcript(conversation)
        return ImagePrompt(renderer.render(self.tokenizer, conversation)[0], {})

    @property
    def marks(self) -> dict[int, str]:
        """The special tokens around calls of tools, by id: in an answer that may have calls they are text."""
        return self.renderer.marks(self.tokenizer) if isinstance(self.renderer, Template) else {}

    def drops_space(self, ids: Sequence[int], *, chat: bool) -> bool:
        """True where an answer, or what continues these ids, begins with a space that is no part of its text."""
        return self._answers_spaced if chat else self._spaced and list(ids) == [self.tokenizer.bos_id]

    def text_stream(
        self, stop: Sequence[str], *, chat: bool, drops_space: bool, marks: Mapping[int, str] | None = None
    ) -> TextStream:
        """The text of an answer, or of what continues a prompt, up to the stop texts."""
        stops = (*stop, *(Transcript.STOP if chat and isinstance(self.renderer, Transcript) else ()))
        return TextStream(self.tokenizer, stops, drops_space=drops_space, marks=marks)

    def stop_ids(self, *, chat: bool) -> tuple[int, ...]:
        """The ids that end an answer, or a text."""
        return self.renderer.stop_ids(self.tokenizer) if chat else self.tokenizer.end_ids

    def reload(self) -> bool:
        """Goes on with the run's newest sound checkpoint, once what runs has ended; False where it is the same."""
        with self._loading:
            newest = max(open_checkpoints(self.model.run.folder).steps(), default=0)
            if newest == self.model.step:
                return False
            model = load_model(self.model.run.folder, self.cfg.mesh)
            if model.step == self.model.step:
                return False
            self.scheduler.reload(model)
            self.model = model
            return True


def _check_transcript(messages: Sequence[Message]) -> None:
    """Raises InputError for messages that a transcript has no place for."""
    said = [message["role"] for message in messages[messages[0]["role"] == "system" :]]
    if any(role not in Transcript.NAMES for role in said):
        raise InputError("a model without a chat template reads one system message, then the user and the assistant")
    if said[-1:] != ["user"]:
        raise InputError("the last message is an answer already; wanted one of the user, to be answered")


def open_service(run_dir: str, cfg: ServeConfig) -> Service:
    """A run, opened and ready to be answered by; raises InputError where it can't be read or lacks the template."""
    with working("reading the model"):
        model: Any = load_model(run_dir, cfg.mesh, cfg.step)
    return Service(model, cfg)

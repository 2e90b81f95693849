"""A model that is served: conversations as ids, the scheduler that answers them, the newest checkpoint of its run."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError
from gptjax.config.serving import ServeConfig
from gptjax.generation.engine import drawable
from gptjax.generation.text_stream import TextStream
from gptjax.parallel.processes import working
from gptjax.runs.load import LoadedModel, load_model, open_checkpoints
from gptjax.serve.scheduler import Scheduler
from gptjax.serve.session import Transcript, renderer_of
from gptjax.serve.tools import check_template, open_tools
from gptjax.tokenizer import set_template
from gptjax.tokenizer.templates import Message, Template
from gptjax.tokenizer.tool_calls import ToolSpec


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
        self._loading = threading.Lock()
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

    def render(self, messages: Sequence[Message], answer: bool = True, tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The ids of a conversation up to where an answer begins, or without one; raises InputError for a bad one.

        `tools` are those that the model is told of.
        """
        conversation, renderer = self.conversation(messages), self.renderer
        if isinstance(renderer, Template):
            return renderer.render(self.tokenizer, conversation, answer, tools)[0]
        if tools:
            raise InputError("tools: this run has no chat template, in which a model is told of them; see --template")
        _check_transcript(conversation)
        return renderer.render(self.tokenizer, conversation)[0]

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

"""A scheduler without a model, for tests of the server: every answer is a text that the test gives."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.serving import ServeConfig
from gptjax.serve.sequence import Busy, Sequence, Token, Update
from gptjax.serve.service import Service
from gptjax.tokenizer import BytesTokenizer

CONTEXT = 256
FINISHES = ("stop", "length", "cancelled", "error")


def fake_model(template: str = "llama2", context: int = CONTEXT, vision: VisionConfig | None = None) -> Any:
    """All that the server reads of a model, and no weights."""
    tokenizer = BytesTokenizer()
    tokenizer.template = template
    if template == "chatml":
        tokenizer.specials = {"<|im_start|>": 256, "<|im_end|>": 257}
    return SimpleNamespace(
        tokenizer=tokenizer, step=7, run=SimpleNamespace(folder=Path("runs/fake")),
        decoder=SimpleNamespace(
            vocab_size=tokenizer.vocab_size, context=context, cfg=SimpleNamespace(vision=vision or VisionConfig())
        ),
    )  # fmt: skip


class FakeScheduler:
    """Writes `text` to everybody, `chunk` tokens at a time, then the end; token i has the log-probability -i / 100.

    Copy c begins c characters later. `seconds` pass between two chunks.
    """

    def __init__(self, model: Any, *, text: str = "Hello", slots: int = 4, max_waiting: int = 8, chunk: int = 3):
        self.model, self.context, self.text, self.chunk, self.seconds = model, model.decoder.context, text, chunk, 0.0
        self.max_waiting, self.fails, self.submitted = max_waiting, "", []
        self._lock, self._waiting, self._running, self._ends = threading.Lock(), [], {}, False
        self._changed = threading.Condition(self._lock)
        self._draining, self.healthy = False, True
        self.stats = SimpleNamespace(
            prompt_tokens=0, reused_tokens=0, generated_tokens=0, prefills=0, prefill_seconds=0.0, decode_chunks=0,
            decode_seconds=0.0, running=0, waiting=0, slots=slots, finished=dict.fromkeys(FINISHES, 0),
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    def submit(self, sequences: list[Sequence]) -> None:
        with self._lock:
            if self._draining or len(self._waiting) + len(sequences) > self.max_waiting:
                raise Busy("full", 2.0, ended=self._draining)
            self._waiting += sequences
            self.submitted += sequences
            self._count()
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        with self._lock:
            if sequence in self._waiting or sequence in self._running:
                self._waiting = [s for s in self._waiting if s is not sequence]
                self._running.pop(sequence, None)
                self._end(sequence, "cancelled")

    def drain(self, timeout: float) -> bool:
        self._draining, end = True, time.monotonic() + timeout
        while (self._waiting or self._running) and time.monotonic() < end:
            time.sleep(0.01)
        for sequence in [*self._waiting, *self._running]:
            self.cancel(sequence)
        return time.monotonic() < end

    def run(self, function: Callable[[], Any]) -> Any:
        return function()

    def reload(self, model: Any) -> None:
        self.model = model

    def _count(self) -> None:
        self.stats.running, self.stats.waiting = len(self._running), len(self._waiting)

    def _end(self, sequence: Sequence, finish: str, tokens: list[Token] | None = None, text: str = "") -> None:
        self._running.pop(sequence, None)
        self.stats.finished[finish] += 1
        self._count()
        sequence.on_update(Update(tokens or [], text, finish))

    def _run(self) -> None:
        while not self._ends:
            if self.seconds:
                time.sleep(self.seconds)
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._ends)
                while self._waiting and len(self._running) < self.stats.slots:
                    self._admit(self._waiting.pop(0))
                for sequence in list(self._running):
                    self._step(sequence)
                self._count()

    def _admit(self, sequence: Sequence) -> None:
        self.stats.prefills += 1
        ids = (
            self._shortest(sequence)
            if sequence.constraint
            else self.model.tokenizer.encode(self.text[sequence.sampling.copy :])
        )
        ends = [self.model.tokenizer.eos_id] if sequence.stop_ids else []
        endless = iter([*ids, *ends]) if sequence.stop_ids else itertools.cycle(ids or [self.model.tokenizer.eos_id])
        self._running[sequence] = itertools.islice(endless, sequence.max_new_tokens), itertools.count()
        sequence.reused = 2
        if sequence.prompt_logprobs:
            top = [(65, -0.1), (sequence.ids[-1], -1.0)][: sequence.top_logprobs]
            sequence.prompt_tokens = [None, *(Token(i, -1.0, top) for i in sequence.ids[1:])]
        if sequence.embed:
            sequence.embedding = np.array([0.6, 0.8])

    def _shortest(self, sequence: Sequence) -> list[int]:
        """The first of the ids that the constraint allows, up to the end."""
        state, ids, left = sequence.constraint.start(), [], sequence.max_new_tokens
        while not sequence.constraint.finished(state):
            ids.append(int(sequence.constraint.allowed(state, left).argmax()))
            state, left = sequence.constraint.advance(state, ids[-1]), left - 1
        return ids

    def _step(self, sequence: Sequence) -> None:
        if self.fails:
            sequence.error = self.fails
            self._end(sequence, "error")
            return
        ids, numbers = self._running[sequence]
        given = list(itertools.islice(ids, self.chunk))
        top = [(65, -0.1), (66, -0.2), (206, -0.3), (256, -0.4)][: sequence.top_logprobs]
        # As of the scheduler: an id that ends the answer is no part of it.
        tokens = [Token(i, -next(numbers) / 100, top) for i in given if i not in sequence.stop_ids]
        drawn = sequence.max_new_tokens if len(given) < self.chunk else 0
        ended = bool(given) and given[-1] in sequence.stop_ids
        self.stats.generated_tokens += len(given)
        text = sequence.text.push(given, final=ended or bool(drawn) or len(given) < self.chunk)
        if ended or sequence.text.stopped:
            self._end(sequence, "stop", tokens, text)
        elif len(given) < self.chunk:
            self._end(sequence, "length", tokens, text)
        elif given:
            sequence.on_update(Update(tokens, text, ""))


def fake_service(
    text: str = "Hello", template: str = "llama2", vision: VisionConfig | None = None, **settings: Any
) -> Service:
    """A service whose scheduler is a fake that has been started."""
    cfg = ServeConfig(**{"slots": 4, "max_waiting": 8, "timeout": 5.0, "drain": 5.0} | settings)
    model = fake_model(template, cfg.context or CONTEXT, vision)
    scheduler = FakeScheduler(model, text=text, slots=cfg.slots, max_waiting=cfg.max_waiting)
    service = Service(model, cfg, scheduler)  # pyright: ignore[reportArgumentType]
    scheduler.start()
    return service

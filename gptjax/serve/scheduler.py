"""Continuous batching: one thread owns the device, and gives its rows to the sequences that wait.

    submit -> waiting -> a free row: what another row has read of the same prompt is taken from there, the rest is read
    a chunk at a time -> running: a few tokens for all rows at once, over and over -> its row is free

Sequences come and go between two calls of the decode loop (Orca, Yu et al. 2022). Reusable is what a prefill wrote:
whole chunks of a prompt, and a prompt that is the same to its end. So reuse changes no bit of an answer.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from gptjax.config.section import InputError
from gptjax.runs.load import LoadedModel
from gptjax.serve.engine import PIECE, SETTINGS, STOPS, Engine, most_length
from gptjax.serve.sequence import Busy, Sequence, Stats, Token, Update, check_sequence
from gptjax.serve.slots import Slot, chunk_ends, shared_prefix, window

CHUNKS = 4  # chunks of prompts that are read before those who run get their next tokens
FAILURES = 3  # calls of the device that may fail one after the other before the server says that it is ill


class Scheduler:
    """Answers sequences with a model, on a thread of its own.

    `context` is how many tokens a prompt and its answer may have together (0: as many as the model reads and half of
    the free memory holds); memory is slots x context keys and values. See `Engine` for the rest. Raises InputError
    where they do not fit.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        slots: int = 16,
        context: int = 0,
        prefill_chunk: int = 128,
        max_waiting: int = 64,
        batch_invariant: bool = False,
    ):
        reads, fits = model.decoder.context, most_length(model.decoder, slots)
        if context > reads or (context or 1) > fits:
            raise InputError(
                f"context={context} of {slots} slots: wanted 1 to {min(reads, fits):,}: the model reads {reads:,}, and "
                f"keys and values of {fits:,} a slot take half of the free memory; set fewer --slots or less --context"
            )
        self.model, self.context = model, context or min(reads, fits)
        self.max_waiting, self.stats = max_waiting, Stats(slots=slots)
        self._make = {"slots": slots, "length": self.context, "chunk": min(prefill_chunk, self.context),
                      "batch_invariant": batch_invariant}  # fmt: skip
        self._slots = [Slot() for _ in range(slots)]
        self._rows = {name: np.zeros(slots, dtype) for name, dtype in SETTINGS.items()}
        self._token_S, self._position_S, self._last_S = (np.zeros(slots, np.int32) for _ in range(3))
        self._stop_SI = np.full((slots, STOPS), -1, np.int32)
        self._waiting: deque[Sequence] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._idle_jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._ending = self._stopped = False
        self._reading: int | None = None
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)

    def start(self) -> None:
        """Lays the weights out, compiles all programs, and begins to answer."""
        ready = self._job(self._jobs, self._open)
        self._thread.start()
        ready.result()

    def submit(self, sequences: list[Sequence]) -> None:
        """Lets sequences wait for their turn, all or none; raises Busy, and InputError where one can't be answered."""
        decoder = self.model.decoder
        for sequence in sequences:
            check_sequence(sequence, self.context, decoder.vocab_size, decoder.cfg.vision)
        with self._changed:
            if self._ending or self._stopped:
                raise _ended()
            if len(self._waiting) + len(sequences) > self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting, of {self.max_waiting} that may", 1.0)
            self._waiting.extend(sequences)
            self.stats.waiting = len(self._waiting)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence; its row is free before the next call of the device."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify()

    def run(self, function: Callable[[], Any]) -> Any:
        """The result of a function that uses the device, run on the thread that owns it between two calls."""
        return self._job(self._jobs, function).result()

    def reload(self, model: LoadedModel) -> None:
        """Goes on with another model of the same kind once those who run are done; nothing read before is reused."""

        def replace() -> None:
            before = self.model
            for slot in self._slots:
                slot.ids = []
            self.engine.state = {}  # two caches may not fit
            try:
                self.model = model
                self._open()
            except Exception:
                self.model = before
                self._open()
                raise

        self._job(self._idle_jobs, replace).result()

    def drain(self, timeout: float) -> bool:
        """Takes no more, and waits for those who are there; False where some were left after `timeout` seconds."""
        with self._changed:
            self._ending = True
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with self._changed:
                if not self._waiting and not any(slot.sequence for slot in self._slots):
                    return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        """Ends the thread; sequences that are left are cancelled."""
        with self._changed:
            self._ending = self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _job(self, jobs: deque[tuple[Callable[[], Any], Future]], function: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self._changed:
            if self._stopped:
                raise _ended()
            jobs.append((function, future))
            self._changed.notify()
        return future

    # What follows runs on the device's thread.

    def _open(self) -> None:
        self.engine = Engine(self.model, **self._make)
        self.engine.warm_up()
        self.engine.reset()

    def _serve(self) -> None:
        mesh = self.model.mesh
        with jax.set_mesh(mesh) if mesh is not None else nullcontext():
            while not self._stopped:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._busy())
                try:
                    self._turn()
                    self.stats.failed = 0
                except Exception as e:  # whatever the device says: those who run are told, and the next are served
                    self._fail(e)
            for slot in range(len(self._slots)):
                self._end(slot, "cancelled")
            with self._changed:
                self._stopped, left, jobs = True, [*self._waiting], [*self._jobs, *self._idle_jobs]
                for queue in (self._waiting, self._jobs, self._idle_jobs):
                    queue.clear()
            for sequence in left:
                sequence.on_update(Update([], "", "cancelled"))
            for _, future in jobs:
                future.set_exception(_ended())

    def _busy(self) -> bool:
        return bool(self._jobs or self._idle_jobs or self._waiting or any(row.sequence for row in self._slots))

    def _turn(self) -> None:
        """One round: jobs, those who left, those who came, and a few tokens for all."""
        _work(self._jobs)
        for _ in range(CHUNKS):
            self._drop_cancelled()
            if self._reading is None and not self._admit():
                break
            self._read_chunk()
        self._decode()
        self.stats.running = sum(row.sequence is not None for row in self._slots)
        if not self.stats.running:
            _work(self._idle_jobs)

    def _drop_cancelled(self) -> None:
        for slot, row in enumerate(self._slots):
            if row.sequence and row.sequence.cancelled:
                self._end(slot, "cancelled")
        with self._changed:
            gone = [sequence for sequence in self._waiting if sequence.cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
            self.stats.waiting = len(self._waiting)
        for sequence in gone:
            self.stats.finished["cancelled"] += 1
            sequence.on_update(Update([], "", "cancelled"))

    def _admit(self) -> bool:
        """Gives the first that waits a free row, with what is there of its prompt; False where there is none."""
        free = [n for n, row in enumerate(self._slots) if row.sequence is None]
        with self._changed:
            if not free or not self._waiting or self._idle_jobs:
                return False
            sequence = self._waiting[0]
        ids = sequence.to_read
        sequence.ends = chunk_ends(len(ids), self.engine.chunk, self.engine.undivided(ids))
        alone = sequence.prompt_logprobs or sequence.embed
        usable = [0 if alone else shared_prefix(row.ids, ids, row.ends, sequence.ends) for row in self._slots]
        source = max(range(len(usable)), key=lambda n: (usable[n], n in free))
        taken = [n for n, row in enumerate(self._slots) if row.sequence is not None]
        if usable[source] and source in free:
            slot = source
        else:  # near to those who run, since a step computes neighbours; of those, the one that was used longest ago
            slot = min(free, key=lambda n: (window([*taken, n], self.engine.sizes)[1], self._slots[n].used))
        row = self._slots[slot]
        with self._changed:  # at no time it is in neither place
            self._waiting.remove(sequence)
            self.stats.waiting = len(self._waiting)
            row.sequence, row.used, row.ids, row.ends = sequence, time.monotonic(), [], sequence.ends
        if usable[source] and source != slot:
            self.engine.copy(source, slot)
        row.ids = ids[: usable[source]]
        sequence.read = sequence.reused = usable[source]
        self.stats.prompt_tokens += len(sequence.ids)
        self.stats.reused_tokens += sequence.reused
        for name in SETTINGS:
            self._rows[name][slot] = getattr(sequence.sampling, name)
        # Where it stands idle it writes at this place, behind what was read of its prompt.
        self._token_S[slot], self._position_S[slot] = sequence.ids[-1], len(ids)
        self._last_S[slot] = len(sequence.ids) - 1 + sequence.max_new_tokens
        self._stop_SI[slot] = [*sequence.stop_ids, *[-1] * (STOPS - len(sequence.stop_ids))]
        self.engine.begin(slot, sequence.ids, dict(sequence.sampling.logit_bias))
        if sequence.constraint:
            sequence.allowed_from = sequence.constraint.start()
        if sequence.prompt_logprobs:
            sequence.prompt_tokens = [None]
        self._reading = slot
        return True

    def _read_chunk(self) -> None:
        """Reads the next part of the prompt that is being read."""
        slot = self._reading
        assert slot is not None
        row = self._slots[slot]
        sequence = row.sequence
        assert sequence is not None
        ids, start = sequence.to_read, sequence.read
        part = ids[start : next((end for end in sequence.ends if end > start), start)]
        if part:
            begun = time.perf_counter()
            image = self.engine.image_tokens(ids, sequence.pictures, start, start + len(part))
            hidden_CD = self.engine.prefill(slot, part, start, image)
            if sequence.prompt_logprobs:
                self._score(sequence, hidden_CD, sequence.ids[start + 1 : start + 1 + len(part)])
            if sequence.embed:
                sequence.hidden_sum = sequence.hidden_sum + np.asarray(hidden_CD, np.float64)[: len(part)].sum(axis=0)
            jax.block_until_ready(hidden_CD)
            self.stats.prefills += 1
            self.stats.prefill_seconds += time.perf_counter() - begun
            sequence.read += len(part)
            row.ids = ids[: sequence.read]
        if sequence.read < len(ids):
            return
        self._reading = None
        if sequence.embed:
            mean_D = sequence.hidden_sum / len(ids)
            sequence.embedding = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
        if not sequence.max_new_tokens:
            self._end(slot, "length")

    def _score(self, sequence: Sequence, hidden_CD: jax.Array, next_ids: list[int]) -> None:
        log_p_C, ids_CQ, log_p_CQ = self.engine.score(hidden_CD, next_ids)
        for id, log_p, ids_Q, log_p_Q in zip(next_ids, log_p_C.tolist(), ids_CQ, log_p_CQ, strict=True):
            sequence.prompt_tokens.append(Token(id, log_p, _top(ids_Q, log_p_Q, sequence.top_logprobs)))

    def _decode(self) -> None:
        """A few tokens for every row whose prompt has been read."""
        live = {n: row.sequence for n, row in enumerate(self._slots) if row.sequence and n != self._reading}
        if not live:
            return
        first, size = window(list(live), self.engine.sizes)
        rows = slice(first, first + size)
        n = PIECE
        for slot, sequence in live.items():
            if sequence.constraint:
                left = sequence.max_new_tokens - sequence.generated
                try:
                    allowed_V = sequence.constraint.allowed(sequence.allowed_from, left)
                except Exception as e:
                    self._refuse(slot, e)
                    continue
                self.engine.restrict(slot, allowed_V, dict(sequence.sampling.logit_bias))
            if sequence.constraint or not sequence.generated:  # the first token is shown at once
                n = 1
        live = {slot: sequence for slot, sequence in live.items() if self._slots[slot].sequence}
        if not live:
            return
        idle_R = np.array([slot not in live for slot in range(first, first + size)])
        ends = {"last_R": self._last_S[rows], "stop_RI": self._stop_SI[rows]}
        settings = {name: x_S[rows] for name, x_S in self._rows.items()}
        top = any(sequence.top_logprobs for sequence in live.values())
        begun = time.perf_counter()
        drawn = self.engine.decode(first, self._token_S[rows], self._position_S[rows], idle_R, settings, ends, n, top)
        self.stats.decode_chunks += 1
        self.stats.decode_seconds += time.perf_counter() - begun
        for slot in live:
            try:
                self._take(slot, slot - first, drawn)
            except Exception as e:
                self._refuse(slot, e)

    def _take(self, slot: int, r: int, drawn: Any) -> None:
        """Tells a sequence of its new tokens, and ends it where one of them does."""
        sequence = self._slots[slot].sequence
        assert sequence is not None
        tokens: list[Token] = []
        text, finish = "", ""
        for i in range(int(drawn.count_R[r])):
            id = int(drawn.ids_RP[r, i])
            self._token_S[slot], self._position_S[slot] = id, self._position_S[slot] + 1
            if id in sequence.stop_ids:
                finish = "stop"
                break
            top = _top(drawn.top_ids_RPQ[r, i], drawn.top_log_p_RPQ[r, i], sequence.top_logprobs)
            tokens.append(Token(id, float(drawn.log_p_RP[r, i]), top))
            sequence.generated += 1
            if sequence.constraint:
                sequence.allowed_from = sequence.constraint.advance(sequence.allowed_from, id)
                if sequence.allowed_from < 0:
                    raise ValueError(f"id {id} was drawn, which the answer's form does not have")
            text += sequence.text.push([id])
            if sequence.text.stopped or sequence.generated >= sequence.max_new_tokens:
                finish = "stop" if sequence.text.stopped else "length"
                break
        self.stats.generated_tokens += len(tokens)
        if finish:
            self._end(slot, finish, tokens, text + sequence.text.push([], final=True))
        elif tokens:
            sequence.on_update(Update(tokens, text, ""))

    def _end(self, slot: int, finish: str, tokens: list[Token] | None = None, text: str = "") -> None:
        row = self._slots[slot]
        if (sequence := row.sequence) is None:
            return
        row.sequence, row.used = None, time.monotonic()
        if self._reading == slot:
            self._reading = None
        self.stats.finished[finish] += 1
        sequence.on_update(Update(tokens or [], text, finish))

    def _refuse(self, slot: int, error: Exception) -> None:
        """Ends one sequence with an error of its own; the others go on."""
        sequence = self._slots[slot].sequence
        if sequence:
            sequence.error = f"{type(error).__name__}: {error}"
        self._end(slot, "error")

    def _fail(self, error: Exception) -> None:
        """Ends all that run with an error, and begins with an empty cache, since the old one may be half written."""
        self.stats.failed += 1
        for slot, row in enumerate(self._slots):
            self._refuse(slot, error)
            row.ids = []
        try:
            self.engine.reset()
        except Exception:  # nothing is left to serve with: all who wait are told, and `healthy` is False
            self._stopped = True

    @property
    def healthy(self) -> bool:
        """False where the device has failed several times in a row, or its thread is gone."""
        return self._thread.is_alive() and self.stats.failed < FAILURES


def _ended() -> Busy:
    return Busy("the server is ending", 5.0, ended=True)


def _work(jobs: deque[tuple[Callable[[], Any], Future]]) -> None:
    """Does what is asked of the device's thread; whoever asked gets the result, or what was raised."""
    while jobs:
        function, future = jobs.popleft()
        try:
            future.set_result(function())
        except BaseException as e:
            future.set_exception(e)


def _top(ids_Q: np.ndarray, log_p_Q: np.ndarray, count: int) -> list[tuple[int, float]]:
    return [(int(id), float(log_p)) for id, log_p in zip(ids_Q[:count], log_p_Q[:count], strict=True)]

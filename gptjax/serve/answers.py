"""Answers as they are written: sequences of one request, their texts and the log-probabilities of their tokens."""

import asyncio
import codecs
import contextlib
import json
import time
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptjax.config.section import InputError, one_line
from gptjax.serve.guard import Gone, disconnected
from gptjax.serve.protocol import ApiError
from gptjax.serve.sequence import Busy, Sequence, Token, Update
from gptjax.serve.service import Service
from gptjax.tokenizer import Tokenizer

LOWEST = -9999.0  # nats, for a token that the model never gives: JSON has no infinity


class Submission:
    """The sequences of one request: submitted together, and cancelled together where the client leaves."""

    def __init__(self, service: Service):
        self._service, self._loop = service, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue()
        self.sequences: list[Sequence] = []
        self._running: set[int] = set()
        self._begun = 0.0
        self.waited: float | None = None
        """Seconds from the submission to the first news of it."""

    def add(self, ids: list[int], **settings: Any) -> Sequence:
        """One more sequence, before they are submitted; the settings are those of Sequence."""
        index = len(self.sequences)
        self.sequences.append(Sequence(ids, on_update=lambda update: self._post((index, update)), **settings))
        return self.sequences[-1]

    def submit(self) -> None:
        """Hands the sequences to the scheduler; raises ApiError (429, 503) where it takes no more."""
        if self._service.draining:
            raise draining()
        try:
            self._service.scheduler.submit(self.sequences)
        except Busy as e:
            wait = str(max(1, round(e.retry_after)))
            if e.ended:
                raise draining() from None
            text = "too many answers are waiting; try again later"
            raise ApiError(
                429, text, kind="rate_limit_error", code="queue_full", headers={"Retry-After": wait}
            ) from None
        self._running, self._begun = set(range(len(self.sequences))), time.perf_counter()

    def _post(self, item: tuple[int, Update] | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the server has ended, and nobody waits
            pass

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yields (sequence, update) until all have ended; raises Gone where the client leaves, ApiError for errors."""
        while self._running:
            item = await self._queue.get()
            if item is None:
                raise Gone
            if self.waited is None:
                self.waited = time.perf_counter() - self._begun
            index, update = item
            if update.finish:
                self._running.discard(index)
            if update.finish == "error":
                text = one_line(self.sequences[index].error or "the answer failed")
                raise ApiError(500, text, kind="server_error", code="internal_error")
            if update.finish == "cancelled":
                raise draining()
            yield item

    async def __aenter__(self) -> "Submission":
        return self

    async def __aexit__(self, *error: object) -> None:
        for index in self._running:
            self._service.scheduler.cancel(self.sequences[index])

    @contextlib.asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """Ends `updates` when the client has left; in the end what still runs is cancelled."""

        async def watch() -> None:
            await disconnected(receive)
            self._queue.put_nowait(None)

        watching = asyncio.create_task(watch())
        async with self:
            try:
                yield
            finally:
                watching.cancel()


def draining() -> ApiError:
    """The refusal of a server that is ending."""
    text = "the server is ending, and takes no more requests"
    return ApiError(503, text, kind="server_error", code="shutting_down", headers={"Retry-After": "5"})


class EventStream(Response):
    """Server-sent events: each object of `events` as a line of data, then [DONE]; an error that comes late is one too.

    The job is cancelled where its client leaves.
    """

    def __init__(self, job: Submission, events: AsyncIterator[Mapping[str, Any]]):
        self._job, self._events = job, events
        self.status_code, self.background = 200, None
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Gone):
            async with self._job.watched(receive):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for event in self._events:
                        await send(_data(event))
                except ApiError as e:
                    await send(_data(e.body))
                done = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
                await send(done)


def _data(event: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}


class ScoredToken(NamedTuple):
    """A token of a text: its bytes, its log-probability in nats, and the likeliest in its place, with theirs."""

    id: int
    raw: bytes
    offset: int
    """Characters of the text before it; those of an unfinished character begin where it does."""
    log_p: float | None
    """None for the first one of a prompt."""
    top: list[tuple[int, float]]


class TokenOffsets:
    """Tokens with their offsets: the texts of their bytes, joined, are the text, but for an end that was cut off."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        start: int = 0,
        *,
        drops_space: bool = False,
        marks: Mapping[int, str] | None = None,
    ):
        self._tokenizer, self._at, self._drop_space = tokenizer, start, drops_space
        self._marks = {i: text.encode() for i, text in (marks or {}).items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int, log_p: float | None, top: list[tuple[int, float]]) -> ScoredToken:
        """The next token."""
        raw = self._marks.get(token_id) or self._tokenizer.decode_bytes([token_id])
        if raw and self._drop_space:
            raw, self._drop_space = raw.removeprefix(b" "), False
        offset = self._at
        self._at += len(self._utf8.decode(raw))
        limit = [(i, _finite(p)) for i, p in top]
        return ScoredToken(token_id, raw, offset, None if log_p is None else _finite(log_p), limit)


def _finite(log_p: float) -> float:
    return log_p if log_p > LOWEST else LOWEST


def token_name(tokenizer: Tokenizer, token_id: int, raw: bytes, mark: str) -> str:
    """A token as text: a special one's name, and behind the mark its bytes where they are no whole characters."""
    if not raw:
        names = {i: name for name, i in tokenizer.specials.items()}
        return names.get(token_id, "")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in raw)


class ReplyPiece(NamedTuple):
    """News of one answer: text, tokens with their log-probabilities, and in the end why it ended."""

    index: int
    text: str
    tokens: list[ScoredToken]
    finish: str


class Reply:
    """One answer, as far as it is written.

    With `trims`, tokens come once their text has, and those behind the text's end (a stop id, what a stop text cut off)
    never do: joined, they are the text. Without, all that were drawn come at once. With `whole` a constraint brings the
    text to its end, also where that takes all tokens that it may have.
    """

    def __init__(self, index: int, offsets: TokenOffsets, ends: Collection[int], *, trims: bool, whole: bool):
        self.index, self._offsets, self._ends, self._trims, self._whole = index, offsets, ends, trims, whole
        self.text, self.finish, self.tokens, self.num_tokens = "", "", [], 0
        self.shown = 0
        """Characters of the text that a stream has sent."""
        self._held: list[ScoredToken] = []

    def take(self, update: Update) -> ReplyPiece:
        """The piece that an update adds."""
        self.text += update.text
        last = update.tokens[-1].id if update.tokens else None
        self.finish = "stop" if update.finish == "length" and (self._whole or last in self._ends) else update.finish
        self.num_tokens += len(update.tokens)
        self._held += [self._offsets.add(token.id, token.log_p, token.top) for token in update.tokens]
        n = len(self._held)
        if self._trims:
            n = sum(1 for token in self._held if token.offset < len(self.text))
        new, self._held = self._held[:n], self._held[n:]
        self.tokens += new
        return ReplyPiece(self.index, update.text, new, self.finish)


def prompt_scores(tokenizer: Tokenizer, ids: list[int], tokens: list[Token | None]) -> list[ScoredToken]:
    """A prompt's tokens, with their scores where there are any."""
    offsets = TokenOffsets(tokenizer, drops_space=tokenizer.adds_space)
    known = tokens or [None] * len(ids)
    return [offsets.add(i, token and token.log_p, token.top if token else []) for i, token in zip(ids, known)]


def answer_room(count: int, wanted: int | None, default: int, context: int, param: str) -> int:
    """The tokens of an answer to a prompt of `count`: those asked for, else what is left, at most `default`.

    Raises ApiError where the prompt or what is asked for does not fit into the context.
    """
    asked = 1 if wanted is None else wanted
    if count + asked > context:
        what = "at least " if wanted is None else ""
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, you requested {what}{count + asked} "
            f"tokens ({count} in the {param}, {what}{asked} in the completion). Shorten the {param} or ask for less.",
            param=param,
            code="context_length_exceeded",
        )
    return min(default, context - count) if wanted is None else wanted


def checked_prompt(service: Service, ids: list[int], where: str) -> list[int]:
    """The ids, none of them outside the vocabulary; raises InputError for others."""
    if wrong := next((i for i in ids if not 0 <= i < service.vocab_size), None):
        raise InputError(f"{where} holds token id {one_line(str(wrong), 30)}; wanted 0 to {service.vocab_size - 1}")
    return ids

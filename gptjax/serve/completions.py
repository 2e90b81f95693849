"""/v1/completions and /v1/chat/completions: from a request to sequences, and from their updates to OpenAI's answers."""

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.generation.constraint import Constraint
from gptjax.generation.image_prompts import ImagePrompt
from gptjax.serve.answers import (
    EventStream,
    Reply,
    ReplyPiece,
    ScoredToken,
    Submission,
    TokenOffsets,
    answer_room,
    checked_prompt,
    prompt_scores,
    token_name,
)
from gptjax.serve.constrained import constraint_of
from gptjax.serve.guard import read_body
from gptjax.serve.protocol import ApiError, ChatRequest, CompletionRequest, SampledRequest, parse_request
from gptjax.serve.sequence import Sampling
from gptjax.serve.service import Service
from gptjax.tokenizer.tool_calls import CLOSE, OPEN, begins_call, parse_calls

SHORT = 16  # tokens that continue a prompt where a request does not say, as OpenAI has it


class Form:
    """A request with its sequences, and the form of its answers; the two endpoints fill in what differs."""

    kind, chunk_kind, prefix, where = "", "", "", "prompt"

    def __init__(self, service: Service, asked: SampledRequest, constraint: Constraint | None):
        self.service, self.asked, self._constraint = service, asked, constraint
        self.tokenizer, self.job = service.tokenizer, Submission(service)
        self.answers: list[Reply] = []
        self.prompts: list[list[int]] = []
        self.seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        if asked.stream_options and not asked.stream:
            raise ApiError(400, "stream_options: wanted stream true with it", param="stream_options")
        self.counts_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        # One fingerprint throughout, also where the weights are exchanged meanwhile.
        self._base = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name,
            "system_fingerprint": service.fingerprint, "seed": self.seed,
        }  # fmt: skip

    def add(
        self,
        ids: list[int],
        *,
        chat: bool,
        default: int,
        wanted: int | None,
        start: int = 0,
        marks: Mapping[int, str] | None = None,
        **more: Any,
    ) -> None:
        """Sequences for n answers to a prompt; equal prompts of a request draw different random numbers.

        `more` are settings of Sequence.
        """
        service, asked = self.service, self.asked
        most = answer_room(len(ids), wanted, default, service.context, self.where)
        if (count := len(self.answers) + (asked.n or 1)) > service.most_sequences:
            got = f"the request asks for at least {count} answers at once"
            raise ApiError(400, f"{got}; wanted at most {service.most_sequences}", param="n", code="invalid_value")
        if self._constraint:
            self._constraint.check(most, "max_tokens")
        # A single token is kept also where it ends the text: clients that score texts expect one.
        ends = () if asked.ignore_eos else service.stop_ids(chat=chat)
        for _ in range(asked.n or 1):
            drops_space = service.drops_space(ids, chat=chat)
            text = service.text_stream(asked.stop or (), chat=chat, drops_space=drops_space, marks=marks)
            offsets = TokenOffsets(self.tokenizer, start, drops_space=drops_space, marks=marks)
            self.answers.append(Reply(len(self.answers), offsets, ends, trims=chat, whole=bool(self._constraint)))
            copy = sum(ids == prompt for prompt in self.prompts)
            self.prompts.append(ids)
            self.job.add(
                ids,
                max_new_tokens=most,
                sampling=self._sampling(copy),
                stop_ids=() if most == 1 else ends,
                text=text,
                constraint=self._constraint,
                **more,
            )

    def _sampling(self, copy: int) -> Sampling:
        asked, defaults = self.asked, Sampling()
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given = {name: float(value) for name in names if (value := getattr(asked, name)) is not None}
        bias = asked.logit_bias or {}
        checked_prompt(self.service, list(bias), "logit_bias")
        top_k = max(asked.top_k or defaults.top_k, 0)
        return Sampling(seed=self.seed, copy=copy, top_k=top_k, logit_bias=bias, **given)

    async def respond(self, request: Request) -> Response:
        """Hands the sequences over, and answers by a stream, or when all have ended."""
        self.job.submit()
        if self.asked.stream:
            request.state.form = self
            return EventStream(self.job, self._events())
        async with self.job.watched(request.receive):
            async for index, update in self.job.updates():
                self.answers[index].take(update)
        request.state.form = self
        choices = [self.choice(answer) for answer in self.answers]
        return JSONResponse(self._base | {"object": self.kind, "choices": choices, "usage": self.usage()})

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        for choice in self.first():
            yield self._chunk([choice])
        async for index, update in self.job.updates():
            answer = self.answers[index]
            for choice in self.deltas(answer, answer.take(update)):
                yield self._chunk([choice])
        if self.counts_usage:
            yield self._chunk([]) | {"usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.counts_usage else {}
        return self._base | {"object": self.chunk_kind, "choices": choices} | usage

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts (each once, however many answers it has) and of the answers."""
        n = self.asked.n or 1
        prompts = sum(map(len, self.prompts[::n]))
        reused = sum(sequence.reused for sequence in self.job.sequences[::n])
        written = sum(answer.num_tokens for answer in self.answers)
        details = {"cached_tokens": reused}
        if self.service.vision.patch:
            details["image_tokens"] = sum(i < 0 for ids in self.prompts[::n] for i in ids)
        return {
            "prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written,
            "prompt_tokens_details": details,
        }  # fmt: skip

    def choice(self, answer: Reply) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def first(self) -> Iterator[dict[str, Any]]:
        """Chunks of a stream before anything is written."""
        yield from ()

    def deltas(self, answer: Reply, piece: ReplyPiece) -> Iterator[dict[str, Any]]:
        """Chunks of a stream for a piece of an answer."""
        raise NotImplementedError


class Completion(Form):
    """The answers to POST /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        service: Service,
        asked: CompletionRequest,
        prompts: Sequence[tuple[list[int], str]],
        constraint: Constraint | None,
    ):
        super().__init__(service, asked, constraint)
        self.asked: CompletionRequest = asked
        self._echo: list[str] = []
        scores: dict[str, Any] = {} if asked.logprobs is None else {"top_logprobs": asked.logprobs}
        if asked.echo and asked.logprobs is not None:
            scores["prompt_logprobs"] = True
        for ids, text in prompts:
            start = len(text) if asked.echo else 0
            self.add(ids, chat=False, default=SHORT, wanted=asked.max_tokens, start=start, **scores)
            self._echo += [text if asked.echo else ""] * (asked.n or 1)
        self._echoed: set[int] = set()

    def choice(self, answer: Reply) -> dict[str, Any]:
        piece = ReplyPiece(answer.index, answer.text, answer.tokens, answer.finish)
        return next(iter(self.deltas(answer, piece)))

    def deltas(self, answer: Reply, piece: ReplyPiece) -> Iterator[dict[str, Any]]:
        tokens, text = piece.tokens, piece.text
        if piece.index not in self._echoed:
            self._echoed.add(piece.index)
            text = self._echo[piece.index] + text
            if self.asked.echo and self.asked.logprobs is not None:
                sequence, ids = self.job.sequences[piece.index], self.prompts[piece.index]
                tokens = [*prompt_scores(self.tokenizer, ids, sequence.prompt_tokens), *tokens]
        if text or tokens or piece.finish:
            yield {
                "index": piece.index, "text": text, "logprobs": self._logprobs(tokens),
                "finish_reason": piece.finish or None,
            }  # fmt: skip

    def _logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        """The form that came with GPT-3: parallel lists."""
        if self.asked.logprobs is None:
            return None
        name = [token_name(self.tokenizer, token.id, token.raw, "bytes:") for token in tokens]
        return {
            "text_offset": [token.offset for token in tokens], "tokens": name,
            "token_logprobs": [token.log_p for token in tokens],
            "top_logprobs": [self._top(token, own) for token, own in zip(tokens, name)],
        }  # fmt: skip

    def _top(self, token: ScoredToken, name: str) -> dict[str, float] | None:
        """The likeliest by name, and the token's own where it is none of them."""
        if token.log_p is None:
            return None
        top: dict[str, float] = {}
        for other, log_p in token.top[: self.asked.logprobs]:
            top.setdefault(token_name(self.tokenizer, other, self.tokenizer.decode_bytes([other]), "bytes:"), log_p)
        top.setdefault(name, token.log_p)
        return top


class Chat(Form):
    """The answers to POST /v1/chat/completions."""

    kind, chunk_kind, prefix, where = "chat.completion", "chat.completion.chunk", "chatcmpl", "messages"

    def __init__(self, service: Service, asked: ChatRequest, prompt: ImagePrompt, constraint: Constraint | None):
        super().__init__(service, asked, constraint)
        self.asked: ChatRequest = asked
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs: wanted logprobs true with it", param="top_logprobs")
        wanted = asked.max_completion_tokens or asked.max_tokens
        if wanted == 0:
            raise ApiError(400, "max_tokens=0: wanted at least 1 for an answer", param="max_tokens")
        self._has_tools = bool(asked.offered)
        self.add(
            prompt.ids, chat=True, default=service.context, wanted=wanted, pictures=prompt.pictures,
            marks=service.marks if self._has_tools else None, top_logprobs=asked.top_logprobs or 0,
        )  # fmt: skip

    def first(self) -> Iterator[dict[str, Any]]:
        for answer in self.answers:
            yield self._delta(answer.index, {"role": "assistant", "content": ""})

    def deltas(self, answer: Reply, piece: ReplyPiece) -> Iterator[dict[str, Any]]:
        text, finish, calls = piece.text, piece.finish, []
        if self._has_tools:  # nothing is shown that may become part of a call
            kept, calls, finish = self._parsed(answer) if finish else (answer.text, [], "")
            end = len(kept) if finish else len(kept[: begins_call(kept)].rstrip())
            text = kept.removeprefix(answer.text[: answer.shown].strip()) if calls else kept[answer.shown : end]
            answer.shown = max(answer.shown, end)
        if text or piece.tokens:
            yield self._delta(piece.index, {"content": text}, tokens=piece.tokens)
        for i, call in enumerate(calls):
            yield self._delta(piece.index, {"tool_calls": [{"index": i} | call]})
        if finish:
            yield self._delta(piece.index, {}, finish=finish)

    def _parsed(self, answer: Reply) -> tuple[str, list[dict[str, Any]], str]:
        """The text of a whole answer without its calls, these in OpenAI's form, and why it ended."""
        if not self._has_tools:
            return answer.text, [], answer.finish
        # A call that was asked for stands without the marks around it.
        bare = self._constraint is not None
        text, calls = parse_calls(f"{OPEN}{answer.text}{CLOSE}" if bare else answer.text)
        if bare and not calls:  # Llama's form has no marks
            text, calls = parse_calls(answer.text)
        if self.asked.parallel_tool_calls is False:
            calls = calls[:1]
        finish = "tool_calls" if calls and answer.finish == "stop" else answer.finish
        return text, [call.as_openai() for call in calls], finish

    def _delta(
        self, index: int, delta: dict[str, Any], *, tokens: list[ScoredToken] | None = None, finish: str = ""
    ) -> dict[str, Any]:
        logprobs = None if tokens is None else self._logprobs(tokens)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish or None}

    def choice(self, answer: Reply) -> dict[str, Any]:
        text, calls, finish = self._parsed(answer)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": answer.index, "message": message, "logprobs": self._logprobs(answer.tokens),
            "finish_reason": finish,
        }  # fmt: skip

    def _logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        return {"content": [self._scored(token) for token in tokens], "refusal": None}

    def _scored(self, token: ScoredToken) -> dict[str, Any]:
        top = token.top[: self.asked.top_logprobs or 0]
        others = [self._named(i, self.tokenizer.decode_bytes([i]), log_p) for i, log_p in top]
        return self._named(token.id, token.raw, token.log_p) | {"top_logprobs": others}

    def _named(self, token_id: int, raw: bytes, log_p: float | None) -> dict[str, Any]:
        name = token_name(self.tokenizer, token_id, raw, "")
        return {"token": name, "logprob": log_p, "bytes": list(raw) if raw else None}


def check_model(service: Service, name: str | None) -> None:
    """Raises ApiError (404) for a model that is not the one that is served."""
    if name is not None and name != service.name:
        text = f"there is no model {name[:80]!r} here; wanted {service.name!r}"
        raise ApiError(404, text, param="model", code="model_not_found")


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service: Service = request.app.state.service
    asked = parse_request(CompletionRequest, await read_body(request, service.cfg))
    check_model(service, asked.model)
    prompts = await run_in_threadpool(prompt_ids, service, asked.prompt)
    constraint = await run_in_threadpool(constraint_of, service, asked, chat=False, spaced=False)
    return await Completion(service, asked, prompts, constraint).respond(request)


def prompt_ids(service: Service, prompts: Sequence[str | list[int]]) -> list[tuple[list[int], str]]:
    """The ids and the text of prompts that are given as texts or as ids; raises InputError for ids that there are not.

    More prompts than could ever be taken at once are not read at all.
    """
    if len(prompts) > service.most_sequences:
        text = f"the request has {len(prompts)} prompts; wanted at most {service.most_sequences}"
        raise ApiError(400, text, param="prompt", code="invalid_value")
    tokenizer = service.tokenizer
    return [
        (tokenizer.prompt_ids(prompt), prompt)
        if isinstance(prompt, str)
        else (checked_prompt(service, prompt, "prompt"), tokenizer.decode(prompt))
        for prompt in prompts
    ]


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service: Service = request.app.state.service
    body = await read_body(request, service.cfg, service.most_body)
    asked = await run_in_threadpool(parse_request, ChatRequest, body)
    check_model(service, asked.model)
    messages = [message.plain(i) for i, message in enumerate(asked.messages)]
    prompt = await run_in_threadpool(service.render, messages, True, asked.offered)
    spaced = service.drops_space(prompt.ids, chat=True)
    constraint = await run_in_threadpool(constraint_of, service, asked, chat=True, spaced=spaced)
    return await Chat(service, asked, prompt, constraint).respond(request)

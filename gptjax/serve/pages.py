"""Pages of the server: the chat, the inspector and labelling; their files, and the endpoints that they alone ask.

What they load comes from web/, nothing from elsewhere, and their policy (Content-Security-Policy) forbids all else. The
chat speaks to the API, as every client does.
"""

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptjax.config.section import InputError, one_line
from gptjax.data.dialogue import Messages
from gptjax.data.images import Picture, from_data_url
from gptjax.generation.image_prompts import ImagePrompt, with_pictures
from gptjax.serve.answers import Submission, answer_room, draining
from gptjax.serve.guard import read_body
from gptjax.serve.inspection import inspect, inspection_json
from gptjax.serve.labels import KINDS, LabelFolder, LabelPrompt
from gptjax.serve.sequence import Sampling
from gptjax.serve.service import Service
from gptjax.tokenizer.templates import Template

WEB = Path(__file__).parent / "web"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
KINDS_OF_FILES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
SAMPLES = 4  # answers of a prompt that are ranked
MOST_TOKENS = 256  # of each of them
ROUNDS = 3  # of draws, for a model that says the same again


def page_routes(labelling: bool, tools: bool) -> tuple[list[Route], list[str]]:
    """The routes of the pages, and the paths among them that want no key: they hold nothing of the model's."""
    pages = {"/": "chat.html", "/inspect": "inspect.html"} | ({"/label": "label.html"} if labelling else {})
    files = {f"/web/{path.name}": path.name for path in sorted(WEB.iterdir()) if path.suffix in (".js", ".css")}
    open_routes = [Route(path, _file(name), methods=["GET"]) for path, name in (pages | files).items()]
    open_routes.append(Route("/page.json", page_facts, methods=["GET"]))
    asked = [Route("/inspection", inspection, methods=["POST"])]
    if tools:
        asked.append(Route("/tool", tool, methods=["POST"]))
    if labelling:
        asked += [Route("/label/next", next_prompt, methods=["POST"]), Route("/label/answer", answer, methods=["POST"])]
    return [*open_routes, *asked], [route.path for route in open_routes]


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    kind = KINDS_OF_FILES[Path(name).suffix]

    async def file(request: Request) -> Response:
        del request
        return Response((WEB / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return file


async def page_facts(request: Request) -> Response:
    """GET /page.json: what the pages show of the server."""
    service: Service = request.app.state.service
    tools = service.toolbox.specs if service.toolbox else []
    facts = {
        "label": bool(service.cfg.label),
        "tools": tools,
        "max_calls": service.cfg.max_calls,
        "images": bool(service.vision.patch),
        "max_images": service.cfg.max_images,
        "chat": isinstance(service.renderer, Template),
    }
    return JSONResponse(facts, headers=HEADERS)


async def tool(request: Request) -> Response:
    """POST /tool: the result of a call of one of the server's own tools, as the text that the model is told."""
    service: Service = request.app.state.service
    body = await _body(request)
    name, arguments = body.get("name"), body.get("arguments")
    if service.toolbox is None or not isinstance(name, str) or not isinstance(arguments, str):
        raise InputError('wanted "name" and "arguments", both texts, of a tool of the server')
    return JSONResponse({"content": await run_in_threadpool(service.toolbox.call, name, arguments)}, headers=HEADERS)


async def inspection(request: Request) -> Response:
    """POST /inspection: what `gptjax inspect --json` writes of a text; with `chat` or `images` of a user's message."""
    service: Service = request.app.state.service
    body = await _body(request, service.most_body)
    text, images = body.get("text"), body.get("images", [])
    if not isinstance(text, str):
        raise InputError(f"text={one_line(repr(text), 40)}; wanted the text to look into")
    if not isinstance(images, list) or not all(isinstance(url, str) for url in images):
        raise InputError("images: wanted data: URLs of pictures")
    if service.draining:
        raise draining()
    prompt = await run_in_threadpool(_asked, service, text, images) if images or body.get("chat") else text
    look = functools.partial(inspect, service.model, prompt, service.tokenizer)
    found = await run_in_threadpool(service.scheduler.run, look)
    try:
        written = await run_in_threadpool(lambda: _compact(inspection_json(found)))
    except ValueError:
        raise InputError("the model's numbers for this text are not finite, so there is nothing to draw") from None
    return Response(written, media_type="application/json", headers=HEADERS)


def _asked(service: Service, text: str, images: list[str]) -> ImagePrompt:
    """The prompt of a question with pictures, up to its answer."""
    names = [f"image {i}" for i in range(1, len(images) + 1)]
    pictures = [Picture.of(from_data_url(url, name), name) for url, name in zip(images, names)]
    return service.render([{"role": "user", "content": with_pictures(text, pictures)}])


async def next_prompt(request: Request) -> Response:
    """POST /label/next: a labeller's progress and next prompt, for rankings with its answers."""
    desk: LabelDesk = request.app.state.desk
    return await desk.state(await _body(request))


async def answer(request: Request) -> Response:
    """POST /label/answer: keeps an answer, a ranking or that one is skipped, or takes the last back; then as above."""
    desk: LabelDesk = request.app.state.desk
    body = await _body(request)
    await run_in_threadpool(desk.keep, body)
    return await desk.state(body)


class LabelDesk:
    """Hands out prompts and keeps answers; draws the samples of the next prompt while one is ranked."""

    def __init__(self, service: Service):
        self._service, self._labels = service, LabelFolder(service.cfg.label)
        self._drawing: dict[str, asyncio.Task[list[str]]] = {}

    def keep(self, body: dict[str, Any]) -> None:
        """Keeps what a page sent, on the disk; raises InputError for anything else."""
        kind, name, prompt_id, labels = body.get("kind", ""), body.get("name", ""), body.get("id", ""), self._labels
        labels.path(kind, name)
        if body.get("take_back"):
            labels.take_back(kind, name)
        elif body.get("skip"):
            labels.skip(kind, name, prompt_id)
        elif kind == "demonstrations":
            labels.demonstrate(name, prompt_id, body.get("answer", ""))
        else:
            answers, ranks = body.get("answers"), body.get("ranks")
            if not isinstance(answers, list) or not isinstance(ranks, list) or not all(type(a) is str for a in answers):
                raise InputError('wanted "answers", a list of texts, and "ranks", a number for each')
            labels.rank(name, prompt_id, answers, ranks)

    async def state(self, body: dict[str, Any]) -> Response:
        """A labeller's progress and next prompt."""
        kind, name, labels = body.get("kind", ""), body.get("name", ""), self._labels
        if kind not in KINDS:
            raise InputError(f"kind={one_line(repr(kind), 40)}; wanted one of {', '.join(KINDS)}")
        progress = await run_in_threadpool(labels.progress, kind, name)
        prompt = await run_in_threadpool(labels.next, kind, name)
        task: dict[str, Any] | None = None
        if prompt is not None:
            task = {"id": prompt.id, "messages": prompt.messages}
            if kind == "rankings":
                await asyncio.shield(self._samples(prompt))  # drawn to the end, also where the labeller has left
                task["answers"] = await run_in_threadpool(labels.shown, prompt, name)
                if (following := await run_in_threadpool(labels.next, kind, name, prompt.id)) is not None:
                    self._samples(following)
        return JSONResponse({**progress._asdict(), "task": task}, headers=HEADERS)

    def _samples(self, prompt: LabelPrompt) -> asyncio.Task[list[str]]:
        if (task := self._drawing.get(prompt.id)) is None:
            task = self._drawing[prompt.id] = asyncio.create_task(self._draw(prompt))

            def ended(done: asyncio.Task[list[str]]) -> None:
                del self._drawing[prompt.id]
                if not done.cancelled():
                    done.exception()  # who waits for it is told; where nobody does, the next one draws again

            task.add_done_callback(ended)
        return task

    async def _draw(self, prompt: LabelPrompt) -> list[str]:
        if (kept := await run_in_threadpool(self._labels.samples, prompt)) is not None:
            return kept
        drawn: list[str] = []
        for number in range(ROUNDS):
            seed = int(prompt.id[:8], 16) ^ number
            drawn += await draw_answers(self._service, prompt.messages, SAMPLES - len(drawn), seed)
            drawn = list(dict.fromkeys(drawn))
            if len(drawn) == SAMPLES:
                break
        mark = f"{self._service.name}, step {self._service.model.step}"
        return await run_in_threadpool(self._labels.keep_samples, prompt, drawn, mark)


async def draw_answers(service: Service, messages: Messages, count: int, seed: int) -> list[str]:
    """So many answers to a conversation, drawn at temperature 1; raises InputError or ApiError where there is none."""
    ids, pictures = await run_in_threadpool(service.render, messages)
    room = answer_room(len(ids), None, MOST_TOKENS, service.context, "messages")
    job, texts = Submission(service), [""] * count
    for copy in range(count):
        text = service.text_stream((), chat=True, drops_space=service.drops_space(ids, chat=True))
        sampling = Sampling(seed=seed, copy=copy)
        more: Any = {"stop_ids": service.stop_ids(chat=True), "text": text, "pictures": pictures}
        job.add(ids, max_new_tokens=room, sampling=sampling, **more)
    job.submit()
    async with job:
        async for index, update in job.updates():
            texts[index] += update.text
    return texts


async def _body(request: Request, most: int = 0) -> dict[str, Any]:
    """The JSON object of a request, of at most so many bytes; raises InputError or ApiError for anything else.

    A form of another site can send no such content type, so a browser asks before it sends one from elsewhere.
    """
    data = await read_body(request, request.app.state.service.cfg, most)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("the request is no JSON; wanted an object") from None
    if not isinstance(body, dict):
        raise InputError(f"the request is a JSON {type(body).__name__}; wanted an object")
    return body


def _compact(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")

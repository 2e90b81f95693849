"""`gptjax serve`: an HTTP server that speaks OpenAI's API: its routes, what it says, and how it ends."""

import asyncio
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from gptjax.config.section import InputError, one_line
from gptjax.config.serving import ServeConfig
from gptjax.parallel.processes import working
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.serve import endpoints
from gptjax.serve.answers import draining
from gptjax.serve.completions import Form, chat_completions, completions
from gptjax.serve.guard import HANDLERS, Guard, error_response
from gptjax.serve.listening import ApiServer, address, listen
from gptjax.serve.monitoring import Monitor
from gptjax.serve.pages import LabelDesk, page_routes
from gptjax.serve.protocol import ApiError
from gptjax.serve.sequence import Busy
from gptjax.serve.service import Service, open_service
from gptjax.serve.session import Transcript

API = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", endpoints.models, methods=["GET"]),
    Route("/v1/models/{name:path}", endpoints.models, methods=["GET"]),
    Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
    Route("/tokenize", endpoints.tokenize, methods=["POST"]),
    Route("/detokenize", endpoints.detokenize, methods=["POST"]),
    Route("/tokenizer_info", endpoints.tokenizer_info, methods=["GET"]),
    Route("/health", endpoints.health, methods=["GET"]),
    Route("/metrics", endpoints.metrics, methods=["GET"]),
    Route("/reload", endpoints.reload, methods=["POST"]),
]


def make_app(service: Service, note: Callable[[str], None] = lambda line: None) -> Starlette:
    """The ASGI application of a service; `note` is given a line for each request that tells something.

    These are all but those for numbers, health and the pages' own files that are answered.
    """
    pages, open_pages = page_routes(bool(service.cfg.label), bool(service.cfg.tools))
    routes, open_paths = [*API, *pages], ["/health", *open_pages]  # these want no key
    monitor, paths = Monitor(service), {route.path for route in routes}

    def noted(scope: Scope, status: int, seconds: float) -> None:
        form: Form | None = scope.get("state", {}).get("form")
        path = scope["path"] if scope["path"] in paths else "other"
        monitor.note(path, status, seconds, form.job.waited if form else None)
        if status != 200 or path not in ("/metrics", *open_paths):  # asked every few seconds, or ten at once by a page
            note(_line(scope, status, seconds))

    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, cfg=service.cfg, open_paths=open_paths, note=noted)],
        exception_handlers=HANDLERS
        | {HTTPException: _http_error, InputError: _input_error, Busy: _ended, Exception: _failure},
    )
    app.router.redirect_slashes = False
    app.state.service, app.state.monitor = service, monitor
    app.state.desk = LabelDesk(service) if service.cfg.label else None
    return app


def _line(scope: Scope, status: int, seconds: float) -> str:
    """A request in one line, without what it said."""
    client = (scope.get("client") or ("-",))[0]
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:80]
    form: Form | None = scope.get("state", {}).get("form")
    tokens = ""
    if form:
        used = form.usage()
        reused = used["prompt_tokens_details"]["cached_tokens"]
        tokens = f", {used['prompt_tokens']} ({reused} reused) + {used['completion_tokens']} tokens"
    return f"{time.strftime('%H:%M:%S')} {client} {scope['method']} {path} {status} {seconds:.3f} s{tokens}"


def _http_error(request: Request, error: Any) -> Response:
    texts = {404: "there is no such path", 405: f"{request.method} is not had here"}
    text = f"{texts.get(error.status_code, error.detail)}; see GET /v1/models and docs/serve.md"
    return error_response(ApiError(error.status_code, text, headers=error.headers))


def _input_error(request: Request, error: Exception) -> Response:
    return error_response(ApiError(400, one_line(error), code="invalid_value"))


def _ended(request: Request, error: Exception) -> Response:
    return error_response(draining())


def _failure(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server failed; its log says why", kind="server_error"))


def serve(run_dir: str, cfg: ServeConfig, say: Callable[[str], None]) -> int:
    """Serves a run until SIGTERM or Ctrl-C, then lets answers finish; returns the exit code, 0.

    Raises InputError where the run can't be read, or the address is taken.
    """
    cfg = replace(cfg, api_key=cfg.api_key or os.environ.get("GPTJAX_API_KEY", ""))
    listening = listen(cfg.host, cfg.port)  # before the model is read, which takes longer
    if cfg.compile_cache:
        enable_compile_cache()
    service = open_service(run_dir, cfg)
    with working("compiling"):
        service.scheduler.start()
    url = address(cfg.host, listening)
    for line in _greeting(service, url):
        say(line)
    server = ApiServer(make_app(service, say), cfg, lambda server: _drain(server, service, say))
    try:
        server.run(sockets=[listening])
    finally:
        service.scheduler.stop()
        service.close()
    say("ended")
    return 0


def _greeting(service: Service, url: str) -> list[str]:
    cfg, base = service.cfg, isinstance(service.renderer, Transcript)
    form = "a transcript" if base else f"template {service.tokenizer.template}"
    lines = [
        f"serving {service.model.run.folder}, step {service.model.step:,}, as {service.name} on {url}",
        f"{cfg.slots} answers at once, {service.context:,} tokens each; chats by {form}; Ctrl-C ends",
    ]
    if not cfg.api_key and cfg.host not in ("127.0.0.1", "::1", "localhost"):
        lines.append(f"anyone who reaches {cfg.host} may use it: set GPTJAX_API_KEY to ask for a key")
    key = ' -H "Authorization: Bearer $GPTJAX_API_KEY"' if cfg.api_key else ""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    curl = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
    label = f"people write and rank answers on {url}/label" if cfg.label else ""
    return [*lines, *filter(None, [label]), f"next: open {url} in a browser, or {curl}"]


def _drain(server: ApiServer, service: Service, say: Callable[[str], None]) -> None:
    """Takes no more requests, and ends the server once the answers that are being written have ended."""

    async def finish() -> None:
        say(f"ending: answers have {service.cfg.drain:g} s to finish")
        if not await run_in_threadpool(service.scheduler.drain, service.cfg.drain):
            say("some answers were cut off")
        server.should_exit = True

    service.draining = True
    server.finishing = asyncio.run_coroutine_threadsafe(finish(), server.loop)

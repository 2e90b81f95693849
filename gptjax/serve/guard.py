"""Checks before anything else: who calls the server, how much a request sends, and how long it takes to.

A page of any site can send requests to 127.0.0.1 from its reader's browser, also under a name of its own that it lets
point there (DNS rebinding). So the Host must be an address, localhost or a name that is configured, and an Origin must
be the server's own or one that is configured.
"""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.config.serving import ServeConfig
from gptjax.serve.protocol import ApiError

METHODS = "GET, POST, OPTIONS"


class Guard:
    """ASGI middleware: checks each request's Host, Origin and key, answers preflights, and notes each answer.

    `note` is given the request's scope, its status and its seconds when the answer has been sent.
    """

    def __init__(
        self, app: ASGIApp, cfg: ServeConfig, open_paths: Iterable[str], note: Callable[[Scope, int, float], None]
    ):
        self._app, self._cfg, self._note = app, cfg, note
        self._open = frozenset(open_paths)
        self._key = cfg.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, start, status = Headers(scope=scope), time.perf_counter(), 499  # who leaves gets no answer
        origin = headers.get("origin")

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if origin and self._named(origin):
                    given = MutableHeaders(scope=message)
                    given["Access-Control-Allow-Origin"] = origin
                    given.add_vary_header("Origin")
            await send(message)

        try:
            refused = self._refusal(scope, headers)
            await (refused or self._app)(scope, receive, sending)
        except Exception:  # what answers it lies further out
            status = 500 if status == 499 else status
            raise
        finally:
            self._note(scope, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that goes no further."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._known_host(host):
            text = f"the Host {host[:80]!r} is not this server's; name it with --hosts"
            return error_response(ApiError(403, text, code="host_not_allowed"))
        if origin is not None and not self._same(origin, host):
            if not self._named(origin):
                text = f"pages of {origin[:80]!r} may not call this server; name it with --origins"
                return error_response(ApiError(403, text, code="origin_not_allowed"))
            if scope["method"] == "OPTIONS":
                asked = headers.get("access-control-request-headers", "authorization, content-type")
                allowed = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Allow-Headers": asked}
                return Response(status_code=204, headers=allowed | {"Access-Control-Max-Age": "600"})
        if self._key and scope["path"] not in self._open and not self._has_key(headers):
            given = "the API key is wrong" if headers.get("authorization") else "an API key is missing"
            text = f"{given}; wanted the header Authorization: Bearer KEY"
            refused = ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            return error_response(refused)
        return None

    def _known_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in ("localhost", *self._cfg.hosts) or _is_address(name) or ("*" in self._cfg.hosts and bool(name))

    def _same(self, origin: str, host: str) -> bool:
        return origin.partition("://")[2].lower() == host.lower()

    def _named(self, origin: str) -> bool:
        return "*" in self._cfg.origins or origin in self._cfg.origins

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # In constant time, so that no answer's time tells how much of a guess is right.
        return hmac.compare_digest(key.strip().encode(), self._key) and scheme.lower() == "bearer"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(request: Request) -> bool:
    """True for a client on this machine."""
    return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback


async def read_body(request: Request, cfg: ServeConfig, most: int = 0) -> bytes:
    """A request's body of JSON, of at most so many bytes (0: cfg.max_body).

    Raises ApiError where it is none by its type, too large, or too slow to come.
    """
    most = most or cfg.max_body
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        text = f"the body is {kind[:60] or 'of no type'}; wanted the header Content-Type: application/json"
        raise ApiError(415, text, code="unsupported_media_type")
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(415, f"the body is packed as {coding[:40]}; wanted it as it is", code="unsupported_media_type")
    too_large = ApiError(413, f"the body is too large; wanted at most {most:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(cfg.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        text = f"the body did not come within {cfg.timeout:g} s"
        raise ApiError(408, text, code="request_timeout", headers={"Connection": "close"}) from None
    return bytes(body)


def error_response(error: ApiError) -> JSONResponse:
    """The answer to a request that is refused."""
    return JSONResponse(error.body, error.status, error.headers)


class Gone(Exception):
    """The client has left."""


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left, once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


HANDLERS: dict[Any, Any] = {
    ClientDisconnect: lambda request, error: Response(status_code=499),
    Gone: lambda request, error: Response(status_code=499),
    ApiError: lambda request, error: error_response(error),
}

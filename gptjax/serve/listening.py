"""The HTTP server itself: uvicorn, with time-outs for slow clients and an end that lets answers finish."""

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.config.section import InputError
from gptjax.config.serving import ServeConfig

KEEP_ALIVE = 30  # seconds that a connection may lie idle between two requests


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which ends a connection whose client is too slow.

    A request's headers must come within so many seconds of the connection, or of the answer before them; what is sent
    must be read within as many. (The body's time is taken where it is read.)
    """

    class Timed(H11Protocol):
        _header: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None

        def _wait(self) -> None:
            self._stop()
            self._header = self.loop.call_later(seconds + KEEP_ALIVE * bool(self.cycle), self.transport.abort)

        def _stop(self) -> None:
            if self._header:
                self._header.cancel()
            self._header = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle and not self.cycle.response_complete:
                self._stop()

        def on_response_complete(self) -> None:
            self._wait()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing:
                self._writing.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            if self._writing:
                self._writing.cancel()
            super().connection_lost(exc)

    return Timed


class ApiServer(uvicorn.Server):
    """uvicorn's server, whose first SIGTERM or Ctrl-C calls `drain`, which sets `should_exit`; the second one ends."""

    loop: asyncio.AbstractEventLoop
    finishing: Any = None
    """What `drain` began, kept from being forgotten."""

    def __init__(self, app: Any, cfg: ServeConfig, drain: Callable[["ApiServer"], None]):
        # A request that can't be read as HTTP is answered, and needs no line of its own.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        super().__init__(
            uvicorn.Config(
                app, http=timed_protocol(cfg.timeout), loop="asyncio", ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, limit_concurrency=cfg.connections,
                timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=5, proxy_headers=False,
            )
        )  # fmt: skip
        self._drain, self._asked = drain, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked:
            self.should_exit = self.force_exit = True
            return
        self._asked = True
        self._drain(self)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises InputError where the address is not this machine's, or the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        text = f"can't listen on {host}, port {port} ({e.strerror or e})"
        raise InputError(f"{text}; give another --port or --host") from e


def address(host: str, listening: socket.socket) -> str:
    """The URL by which the server is called from this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{listening.getsockname()[1]}"

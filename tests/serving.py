"""A server in a thread of this process, on a port of its own, for tests."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from gptjax.serve.listening import ApiServer, address, listen
from gptjax.serve.server import make_app
from gptjax.serve.service import Service


@contextlib.contextmanager
def serving(service: Service, lines: list[str] | None = None, send_buffer: int = 0) -> Iterator[str]:
    """The URL of a server that runs within this block; what it says of requests goes to `lines`.

    `send_buffer` are the bytes that the system keeps for a client that does not read.
    """
    listening = listen("127.0.0.1", 0)
    if send_buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = ApiServer(make_app(service, [].append if lines is None else lines.append), service.cfg, lambda _: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address("127.0.0.1", listening)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()

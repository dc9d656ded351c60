"""The server of an application, in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from rapidin.errors import UserError

_GOODBYE_SECONDS = 3  # that open connections have to end
_BACKLOG = 256  # connections that may wait until they are accepted


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections. Raises UserError if the address is in use, or is none of this
    machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}", "use another `host` or `port`"
        ) from None
    return listening


@contextmanager
def running(app: Any, listening: socket.socket) -> Iterator[threading.Thread]:
    """Inside the block a thread answers what comes to the socket."""
    config = uvicorn.Config(
        app,
        log_level="critical",  # errors of the application are logged by itself
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_GOODBYE_SECONDS,
    )
    server = uvicorn.Server(config)  # sets no signal handlers outside of the main thread
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), name="rapidin-web", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join(_GOODBYE_SECONDS + 2)

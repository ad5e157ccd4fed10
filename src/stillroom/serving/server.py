"""The server: uvicorn on a socket of its own, that ends cleanly (extra ``serve``)."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

from stillroom.errors import UsageError, missing_extra

WAITING = 2048  # connections that the system holds before they are taken
# longer than clients keep one: a connection that is closed while a question is on its way is an error at the client
IDLE = 75  # seconds that an unused connection is kept
PATIENCE = 30  # seconds that requests in flight are given after SIGTERM


def serve(app: Any, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT: then no new connection is taken, and every request in flight is answered.

    ``port`` 0: a free one. ``ready(address)`` is called once connections are taken. Raises UsageError for a port that
    is taken.
    """
    server = make_server(app)

    def end(*_: object) -> None:
        server.should_exit = True

    with listen(host, port) as listening:
        # uvicorn raises a signal that it heard once more at its end, which would end the process as if killed
        before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            ready(address_of(listening))
            server.run(sockets=[listening])
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def make_server(app: Any) -> Any:
    """A uvicorn server of the application, not yet running."""
    try:
        import uvicorn
    except ImportError as error:
        raise missing_extra("uvicorn", "serve") from error
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=PATIENCE,
        timeout_keep_alive=IDLE,
        ws="none",
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections there. Raises UsageError for a port that is taken."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UsageError(f"{host}:{port} cannot be served at ({error.strerror}). Choose another --port.") from None
    listening.listen(WAITING)
    return listening


def address_of(listening: socket.socket) -> str:
    """'http://127.0.0.1:8000'."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

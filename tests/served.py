"""A real server on a free port of this machine, in a thread of the test."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stillroom.serving.server import address_of, listen, make_server


@dataclass
class Server:
    address: str
    server: Any
    thread: threading.Thread

    def end(self, patience: float = 60) -> None:
        """What SIGTERM does."""
        self.server.should_exit = True
        self.thread.join(patience)
        assert not self.thread.is_alive()


@contextmanager
def running(app) -> Iterator[Server]:
    listening = listen("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Server(address_of(listening), server, thread)
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()


def taken(address: str) -> bool:
    """Whether connections are taken there."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.socket() as one:
        one.settimeout(5)
        return one.connect_ex((host, int(port))) == 0

"""The door: how many requests are open at once, how large one may be, and what is counted of each. Plain ASGI."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from stillroom.serving.counting import Counts

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RETRY = 1  # seconds after which a refused client may come again


class Door:
    """Lets at most ``most`` requests in at once; the rest are told to come again (503, Retry-After).

    A request inside waits for its answer for as long as it takes: its connection is the queue. ``largest``: bytes of
    a body (413). Health and metrics always pass.
    """

    def __init__(
        self, app: Any, counts: Counts, paths: frozenset[str], most: int = 1024, largest: int = 4 << 20
    ) -> None:
        self.app, self.counts, self.paths, self.most, self.largest = app, counts, paths, most, largest
        self.inside = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # a path that nobody serves has one name, or strangers could fill the memory with names
        path, status, begun = scope["path"] if scope["path"] in self.paths else "other", [500], time.perf_counter()

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        self.inside += 1
        self.counts.open.set(self.inside)
        try:
            if self.inside > self.most and path not in ("/health", "/metrics"):
                await _refuse(told, 503, f"{self.most} requests are being answered: come again.", RETRY)
            else:
                await self._pass(scope, receive, told)
        finally:
            self.inside -= 1
            self.counts.open.set(self.inside)
            self.counts.requests.labels(path, status[0]).inc()
            self.counts.seconds.labels(path).observe(time.perf_counter() - begun)

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _body(receive, self.largest)
        if body is None:
            await _refuse(send, 413, f"the body is larger than {self.largest:,} bytes.")
            return
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return given.pop() if given else await receive()

        await self.app(scope, again, send)


async def _body(receive: Receive, largest: int) -> bytes | None:
    """The whole body of a request; None where it is longer than ``largest`` bytes."""
    found = bytearray()
    while True:
        message = await receive()
        found += message.get("body", b"")
        if len(found) > largest:
            return None
        if not message.get("more_body", False):
            return bytes(found)


async def _refuse(send: Send, status: int, says: str, retry: int | None = None) -> None:
    body = json.dumps({"error": says}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # the body was not read to its end, so the connection cannot carry another request
    headers += [(b"retry-after", str(retry).encode())] if retry is not None else [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

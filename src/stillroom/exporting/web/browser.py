"""The folder of a page, run by a browser without a window: every example goes through it, and its answers come back."""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import shutil
import subprocess
import tempfile
import threading
import weakref
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import MissingExtraError, ParityError, UsageError
from stillroom.exporting.artifact import Tensors
from stillroom.files import read_json

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 300  # for a browser to start, or to answer
POLL = 10  # after which the page asks again
ABOUT = "about.json"
_TYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
END = "end"


def browser() -> str:
    """The browser's program. Raises MissingExtraError without one."""
    for name in BROWSERS:
        found = shutil.which(name)
        if found:
            return found
    raise MissingExtraError("there is no Chromium to run the page in. Install it: apt install chromium.")


class InBrowser:
    """The page's model as a function of tensors. A browser and a server on 127.0.0.1 live as long as this object."""

    def __init__(self, folder: Path) -> None:
        self._asked: queue.Queue[Any] = queue.Queue()
        self._said: queue.Queue[Any] = queue.Queue()
        self._inputs = read_json(folder / ABOUT)["inputs"]
        self._memory: int | None = None
        handler = functools.partial(_Page, str(folder), self._asked, self._said)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._profile = tempfile.TemporaryDirectory()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        address = f"http://127.0.0.1:{server.server_port}/verify.html"
        process = subprocess.Popen(
            [browser(), *flags, f"--user-data-dir={self._profile.name}", address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.close = weakref.finalize(self, _end, process, server, self._asked, self._profile)
        self._answer()

    def __call__(self, tensors: Tensors) -> Tensor:
        """The output of the network's input tensors, in their order."""
        if len(tensors) != len(self._inputs):
            raise UsageError(f"the artefact takes {len(self._inputs)} inputs, but the adapter gives {len(tensors)}.")
        heads, content = [], b""
        for known, tensor in zip(self._inputs, tensors, strict=True):
            data = tensor.detach().cpu().to(_TYPES[known["dtype"]]).contiguous().numpy().tobytes()
            heads.append(
                {"name": known["name"], "dtype": known["dtype"], "dims": list(tensor.shape), "bytes": len(data)}
            )
            content += data
        self._asked.put((json.dumps(heads), content))
        said, body = self._answer()
        self._memory = said["memory"] or self._memory
        return torch.from_numpy(np.frombuffer(body, dtype=np.float32).copy()).reshape(said["dims"])

    def memory(self, tensors: Tensors) -> dict[str, Any]:
        """The memory of WebAssembly, which only grows: the library, the model and the answers so far."""
        self(tensors)
        return {"peak_bytes": self._memory, "how": "WebAssembly's memory, the library in it"}

    def _answer(self) -> tuple[dict[str, Any], bytes]:
        try:
            said, body = self._said.get(timeout=SECONDS)
        except queue.Empty:
            raise ParityError(f"the browser has not answered within {SECONDS} s.") from None
        if "error" in said:
            raise ParityError(f"the browser cannot run the page: {said['error'][:500]}.")
        return said, body


def _end(process: Any, server: Any, asked: Any, profile: Any) -> None:
    asked.put(END)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    server.shutdown()
    server.server_close()
    with contextlib.suppress(OSError):
        profile.cleanup()


class _Page(SimpleHTTPRequestHandler):
    """The folder's files; /ask waits for the next inputs, /answer takes what the page found."""

    extensions_map = {  # noqa: RUF012  (as the class above has it)
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, folder: str, asked: Any, said: Any, *rest: Any) -> None:
        self._asked, self._said = asked, said
        super().__init__(*rest, directory=folder)

    def do_GET(self) -> None:
        if self.path == "/verify.html":
            text = (resources.files("stillroom.exporting.web") / "verify.html").read_bytes()
            return self._reply(200, text, "text/html")
        if self.path != "/ask":
            return super().do_GET()
        try:
            asked = self._asked.get(timeout=POLL)
        except queue.Empty:
            return self._reply(204, b"", "text/plain")
        if asked == END:
            return self._reply(410, b"", "text/plain")
        return self._reply(200, asked[1], "application/octet-stream", asked[0])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._said.put((json.loads(self.headers["x-said"]), body))
        self._reply(200, b"", "text/plain")

    def _reply(self, code: int, body: bytes, kind: str, inputs: str | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if code != 204:
            self.send_header("Content-Length", str(len(body)))
        if inputs is not None:
            self.send_header("x-inputs", inputs)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: Any) -> None:
        """Nothing: a person watches a progress bar."""


def open_page(folder: Path) -> InBrowser:
    """The folder in a headless Chromium."""
    return InBrowser(folder)

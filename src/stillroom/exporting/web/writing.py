"""A folder with a page that answers in the browser: the ONNX file, onnxruntime-web, and what the page says."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from stillroom.errors import MissingExtraError
from stillroom.exporting.artifact import Tensors, Written
from stillroom.exporting.onnx import graph as onnx
from stillroom.exporting.web import fetched
from stillroom.exporting.web.browser import ABOUT, browser, open_page
from stillroom.files import write_bytes, write_json
from stillroom.students.networks import Student

PRECISIONS = ("fp32", "int8")
MODEL = "model.onnx"


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write the folder ``path``: index.html, model.onnx, the runtime, and some examples to begin with.

    Served by any web server (python3 -m http.server), it answers without another. Raises what the ONNX target raises.
    """
    first = onnx.write(student, tensors, calibration, path / "model", precision)
    for name, content in fetched.runtime().items():
        write_bytes(path / name, content)
    inputs = [
        {
            "name": known["name"],
            "dtype": known["dtype"],
            "dims": list(tensor.shape[1:]),
            "examples": [[round(n, 4) for n in row.flatten().tolist()] for row in tensor],
        }
        for known, tensor in zip(first.notes["inputs"], tensors, strict=True)
    ]
    about = {"inputs": inputs, "output": student.answers, "classes": list(student.classes) if student.classes else None}
    write_json(path / ABOUT, about)
    own = resources.files("stillroom.exporting.web")
    write_bytes(path / "answer.mjs", (own / "answer.mjs").read_bytes())
    write_bytes(path / "index.html", _page((own / "index.html").read_text(encoding="utf-8"), student, about).encode())
    versions = {**first.notes["versions"], fetched.PACKAGE: fetched.VERSION}
    return Written(path, open_page, {**first.notes, "versions": versions}, main=MODEL)


def _page(text: str, student: Student, about: dict[str, Any]) -> str:
    said = json.dumps(about).replace("<", "\\u003c")  # no name of a class ends the script
    for name, value in (("$TITLE", html.escape(student.name)), ("$VERSION", fetched.VERSION), ("$ABOUT", said)):
        text = text.replace(name, value)
    return text


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """What the ONNX graph cannot hold, language models, and a machine without npm or a browser."""
    browser()
    if not fetched.is_there():
        raise MissingExtraError("npm is not installed, to fetch onnxruntime-web. Install it: apt install npm.")
    if student.answers == "next_token":
        return "a language model writes one token after another, and the page asks once. Use gguf"
    return onnx.unsupported(student, tensors, precision)

"""The end of the wire that runs inside an environment of its own: ``python inside.py SCRIPT``. Knows no stillroom.

A message is two pieces, each after its length (8 bytes, little-endian): JSON, then safetensors. Requests:
{"call": NAME, "settings": ...}: the script's function of (settings, arrays), which returns (JSON, arrays).
{"open": settings}: the script's open_model(settings): a function of arrays of one example, kept for what follows, and
JSON that says the ``inputs`` it takes.
{"run": true}: the opened model's answers to arrays [B, ...], one example after the other.
{"memory": settings}: bytes most resident while the model is opened once more and answers once, above what was before.
{"time": runs}: seconds of each of so many answers to single examples, taken in turn, in here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy

Arrays = dict[str, np.ndarray]
WARM_UP = 5


def send(stream: BinaryIO, said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write one message."""
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for piece in (json.dumps(said).encode(), safetensors.numpy.save(tensors)):
        stream.write(len(piece).to_bytes(8, "little"))
        stream.write(piece)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], Arrays] | None:
    """Read one message; None when the other end is gone."""
    pieces = []
    for _ in range(2):
        size = stream.read(8)
        piece = stream.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
        if len(size) < 8 or len(piece) < int.from_bytes(size, "little"):
            return None
        pieces.append(piece)
    return json.loads(pieces[0]), safetensors.numpy.load(pieces[1])


def in_order(arrays: Arrays) -> list[np.ndarray]:
    """The arrays named 0, 1, ... in the order of their numbers."""
    return [arrays[str(index)] for index in range(len(arrays))]


def _answer(script: Any, kept: dict[str, Callable[..., Any]], asked: dict[str, Any], arrays: Arrays) -> Any:
    if "call" in asked:
        return getattr(script, asked["call"])(asked["settings"], arrays)
    if "open" in asked:
        kept["run"], described = script.open_model(asked["open"])
        return described, {}
    inputs = in_order(arrays)
    singles = [[column[row : row + 1] for column in inputs] for row in range(len(inputs[0]))]
    if "run" in asked:
        return {}, {"0": np.concatenate([kept["run"](single) for single in singles])}
    if "memory" in asked:
        return {"peak_bytes": _peak(script, asked["memory"], singles[0])}, {}
    for index in range(WARM_UP):
        kept["run"](singles[index % len(singles)])
    seconds = []
    for index in range(asked["time"]):
        start = time.perf_counter()
        kept["run"](singles[index % len(singles)])
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}, {}


def _peak(script: Any, settings: Any, single: list[np.ndarray]) -> int | None:
    """Its libraries are loaded and the first model stays, so what is added is this one's. None where Linux is not."""
    try:
        before = _resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the most so far
        run, _ = script.open_model(settings)
        run(single)
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        return None


def _resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


def main(path: str) -> None:
    """Answer until the other end is gone. Whatever a library prints goes to stderr, never between the messages."""
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    spec = importlib.util.spec_from_file_location("script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    kept: dict[str, Callable[..., Any]] = {}
    while (message := receive(sys.stdin.buffer)) is not None:
        try:
            said, arrays = _answer(script, kept, *message)
        except Exception as error:
            traceback.print_exc()
            said, arrays = {"error": f"{type(error).__name__}: {error}"}, {}
        send(wire, said, arrays)


if __name__ == "__main__":
    main(sys.argv[1])

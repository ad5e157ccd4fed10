"""A process inside an environment of its own: functions of a script are called there, files and arrays come back."""

from __future__ import annotations

import os
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from stillroom.apart import python_apart
from stillroom.errors import StillroomError, UsageError, nearest
from stillroom.exporting.apart import inside
from stillroom.exporting.artifact import Tensors

PINS = Path(__file__).parent  # NAME.txt: all that is installed beside our torch; its first line says how much it is


def names() -> tuple[str, ...]:
    """The environments that targets use."""
    return tuple(sorted(path.stem for path in PINS.glob("*.txt")))


def environment(name: str) -> Path:
    """The Python of the environment, made where it is not there yet (minutes; said on stderr).

    Raises UsageError for an unknown name, and with pip's last words and what to do when it cannot be made.
    """
    if name not in names():
        raise UsageError(f"there is no environment {name!r}{nearest(name, names())}")
    try:
        return python_apart(PINS / f"{name}.txt", lend_torch=True)
    except UsageError as error:
        raise UsageError(
            f"{error} For a machine that is offline, make it beforehand: python -m stillroom.exporting.apart {name}"
        ) from error


class ApartError(StillroomError, RuntimeError):
    """What runs in an environment of its own failed; the message is the library's own."""


class Apart:
    """A process that runs ``script`` in the environment ``name``; it ends with this object, or with this process."""

    def __init__(self, name: str, script: Path, threads: int = 1) -> None:
        python = environment(name)
        self._name = name
        self._log: Any = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process lives)
        # One thread, and nothing of this environment's modules (-I): PYTHONPATH would bring them in.
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._process = subprocess.Popen(
            [str(python), "-I", inside.__file__, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=variables,
        )
        self._end = weakref.finalize(self, _end, self._process, self._log)

    def close(self) -> None:
        """End the process."""
        self._end()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self, name: str, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The script's function ``name`` of (settings, arrays): plain JSON and arrays, both ways."""
        return self.ask({"call": name, "settings": settings}, arrays or {})

    def ask(
        self, said: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """One message there, one back. Raises ApartError with the library's error, or its last words when it died."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        try:
            inside.send(_binary(to), said, arrays)
            answer = inside.receive(_binary(back))
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = self._process.wait()
            raise ApartError(f"the process in the environment {self._name!r} ended ({code}): {self.last_words()}")
        if "error" in answer[0]:
            raise ApartError(answer[0]["error"])
        return answer

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        # by place: the process writes where the file's own position is
        place = self._log.fileno()
        lines = os.pread(place, os.fstat(place).st_size, 0).decode(errors="replace").splitlines()
        return " / ".join(line.strip() for line in lines[-4:] if line.strip())[-800:]


class Runtime:
    """A model that was opened in an environment of its own: an artifact's ``run``. One example after the other."""

    def __init__(self, name: str, script: Path, settings: Mapping[str, Any]) -> None:
        self._opens = (name, script, settings)
        self._apart = Apart(name, script)
        self._inputs = self._apart.ask({"open": settings}, {})[0]["inputs"]  # name, dtype and shape of each

    def __call__(self, tensors: Tensors) -> Tensor:
        """The network's input tensors [B, ...] to its output [B, ...]."""
        _, arrays = self._apart.ask({"run": True}, self._arrays(tensors))
        return torch.from_numpy(arrays["0"].copy())

    def seconds(self, tensors: Tensors, runs: int) -> list[float]:
        """Seconds of ``runs`` single answers, measured beside the runtime: the way to its process does not count."""
        return self._apart.ask({"time": runs}, self._arrays(tensors))[0]["seconds"]

    def memory(self, tensors: Tensors) -> dict[str, Any]:
        """{"peak_bytes", "how"}: what opening the file and one answer add to a fresh process of the environment."""
        name, script, settings = self._opens
        with Apart(name, script) as apart:
            apart.ask({"open": settings}, {})
            found = apart.ask({"memory": settings}, self._arrays(tensors))[0]["peak_bytes"]
        how = "most resident, in a fresh process of its environment" if found is not None else "only Linux tells it"
        return {"peak_bytes": found, "how": how}

    def _arrays(self, tensors: Tensors) -> dict[str, np.ndarray]:
        if len(tensors) != len(self._inputs):
            raise UsageError(f"the artefact takes {len(self._inputs)} inputs, but the adapter gives {len(tensors)}.")
        arrays = {}
        for index, (tensor, wanted) in enumerate(zip(tensors, self._inputs, strict=True)):
            shape = list(wanted["shape"])[1:]
            if list(tensor.shape[1:]) != shape:
                raise UsageError(
                    f"the artefact takes {wanted['name']} of shape [1, {', '.join(map(str, shape))}] and no other; "
                    f"this is {list(tensor.shape)}. Shapes are fixed in this format: use onnx for others."
                )
            arrays[str(index)] = tensor.detach().cpu().to(getattr(torch, wanted["dtype"])).numpy()
        return arrays


def _binary(stream: Any) -> BinaryIO:
    return stream


def _end(process: subprocess.Popen[bytes], log: Any) -> None:
    for stream in (process.stdin, process.stdout):
        try:
            if stream is not None:
                stream.close()
        except BrokenPipeError:
            pass
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    log.close()

"""C source, compiled by the machine's own compiler and called through ctypes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import DataError, FolderError, UsageError
from stillroom.exporting.artifact import Run, Tensors

FLAGS = ("-std=c99", "-O2")
REFUSALS = {
    1: "it holds NaN or an infinity",
    2: "it lies outside the ranges of the calibration inputs",
    3: "the answer is not finite",
}
Entry = Callable[[np.ndarray, np.ndarray], int]  # one observation [I] and the place of the answer [O] to a return code


def open_c(path: Path) -> Run:
    """The source compiled by gcc -O2: the network's input [B, ...] to its output [B, O], row by row by NAME_run.

    Raises DataError, with the row, where an observation is refused.
    """
    run, inputs, outputs = entry(path)

    def answer(tensors: Tensors) -> Tensor:
        rows = np.ascontiguousarray(tensors[0].detach().cpu().float().numpy().reshape(len(tensors[0]), -1))
        if len(tensors) != 1 or rows.shape[1] != inputs:
            raise UsageError(
                f"the C artefact takes one input of {inputs} floats, not {[list(t.shape) for t in tensors]}."
            )
        found = np.empty((len(rows), outputs), np.float32)
        for row in range(len(rows)):
            code = run(rows[row], found[row])
            if code:
                raise DataError(f"the C artefact refused row {row}: {REFUSALS[code]}.")
        return torch.from_numpy(found)

    return answer


def entry(path: Path, kind: str = "run", flags: tuple[str, ...] = FLAGS) -> tuple[Entry, int, int]:
    """One entry of the compiled source (run, run_clamped, run_within), and the sizes of its input and output."""
    source = path.read_text()
    found = re.search(r"^int (\w+)_run\(", source, re.MULTILINE)
    head = path.parent / f"{found[1]}.h" if found else path
    sizes = re.findall(r"^#define \w+_(?:INPUTS|OUTPUTS) (\d+)$", head.read_text(), re.MULTILINE)
    if found is None or len(sizes) != 2:
        raise FolderError(f"{path} is not C that stillroom wrote, or its header has changed. Export it again.")
    inputs, outputs = map(int, sizes)
    place = Path(tempfile.mkdtemp(prefix="stillroom-c-"))
    try:
        # Linked without the flags: -ffast-math would there make this whole process lose its subnormal numbers.
        _compile(path, place / "model.o", (*flags, "-c", "-fPIC"))
        _compile(place / "model.o", place / "model.so", ("-shared",))
        library = ctypes.CDLL(str(place / "model.so"))
    finally:
        shutil.rmtree(place)  # what is loaded stays mapped
    function = getattr(library, f"{found[1]}_{kind}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int

    def run(observation: np.ndarray, answer: np.ndarray) -> int:
        return function(observation.ctypes.data, answer.ctypes.data)

    return run, inputs, outputs


def measured(path: Path, name: str) -> dict[str, Any]:
    """What the compiled source takes: bytes of code and constants, of changeable data (0), and of stack in one call."""
    with tempfile.TemporaryDirectory() as place:
        compiled = Path(place) / "model.o"
        _compile(path, compiled, (*FLAGS, "-c", "-fstack-usage"))
        numbers = subprocess.run(["size", compiled], capture_output=True, text=True, check=True).stdout.split()[6:9]
        stack = _stack(compiled.with_suffix(".su").read_text(), name)
    text, data, bss = map(int, numbers)
    version = subprocess.run(
        [_compiler(), "-dumpfullversion"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "compiler": f"gcc {version} {' '.join(FLAGS)}",
        "read_only_bytes": text,
        "changeable_bytes": data + bss,
        "stack_bytes": stack,
    }


def _stack(usage: str, name: str) -> int:
    """The deepest chain: entry, answer, network, and the largest operator that was not inlined."""
    found = {line.split("\t")[0].rsplit(":", 1)[-1]: int(line.split("\t")[1]) for line in usage.splitlines()}
    own = {f"{name}_{end}": found.pop(f"{name}_{end}", 0) for end in ("answer", "network", "finite")}
    entries = [found.pop(f"{name}_{kind}", 0) for kind in ("run", "run_clamped", "run_within")]
    return max(entries) + own[f"{name}_answer"] + own[f"{name}_network"] + max([*found.values(), 0])


def _compile(source: Path, target: Path, flags: tuple[str, ...]) -> None:
    command = [_compiler(), *flags, str(source), "-o", str(target), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise UsageError(f"gcc cannot compile {source.name}: {(lines or ['no message'])[0]}")


def _compiler() -> str:
    found = shutil.which("gcc")
    if found is None or shutil.which("size") is None:
        raise UsageError("the C target compiles what it writes, and there is no gcc here. Install gcc, or use onnx.")
    return found

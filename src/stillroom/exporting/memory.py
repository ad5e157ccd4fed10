"""How much memory one answer takes: the most resident bytes of a fresh process, its runtime's own code left out."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stillroom import settings
from stillroom.exporting.artifact import Run, Tensors, Written

STATUS = Path("/proc/self/status")
SECONDS = 300  # more than any artefact needs to be opened and asked once
ASK = "from stillroom.exporting.memory import answer_once; answer_once()"


def peak_memory(run: Run, written: Written, tensors: Tensors, modules: Sequence[str]) -> dict[str, Any]:
    """{"peak_bytes", "how"} of opening what was written and answering one example once; null where unknown.

    A new process imports ``modules`` (the runtime) and what opens it, notes its resident memory, opens the
    file, answers, and reads the most that was resident since (Linux: VmHWM after it was reset). A runtime that lives
    outside of Python says it itself, by a method ``memory``.
    """
    own = getattr(run, "memory", None)
    if own is not None:
        return own(tensors)
    assert written.open is not None
    opener, path = settings.name_of(written.open), written.path
    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place) / "inputs.safetensors"
        save_file({f"{number:03d}": tensor.contiguous() for number, tensor in enumerate(tensors)}, inputs)
        asked = {"open": opener, "path": str(path.resolve()), "inputs": str(inputs), "modules": list(modules)}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        try:
            done = subprocess.run(
                [sys.executable, "-c", ASK, json.dumps(asked)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"peak_bytes": None, "how": f"no answer within {SECONDS} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended"])[-1]
        return {"peak_bytes": None, "how": f"the process that was to measure it failed: {reason[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def answer_once() -> None:
    """The other process: what it is asked stands in its first argument, what it found is printed."""
    asked = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    for module in asked["modules"]:
        importlib.import_module(module)
    opened = settings.resolve(asked["open"])
    found = load_file(asked["inputs"])
    tensors = tuple(found[name] for name in sorted(found))
    before, reset = _resident("VmRSS"), _forget_peak()
    _answer(opened(Path(asked["path"])), tensors)
    peak = _resident("VmHWM" if reset else "VmRSS")
    if before is None or peak is None:
        said: dict[str, Any] = {"peak_bytes": None, "how": "only Linux tells it"}
    else:
        how = "most resident" if reset else "resident afterwards"
        said = {"peak_bytes": max(peak - before, 0), "how": f"{how}, in a fresh process, its imports left out"}
    sys.stdout.write(json.dumps(said) + "\n")


def _answer(run: Any, tensors: tuple[Tensor, ...]) -> None:
    if hasattr(run, "after"):  # a runtime that tells the next token only
        run.after(tensors[0][0].tolist()[: run.longest])
    else:
        run(tensors)


def _resident(name: str) -> int | None:
    """Bytes of VmRSS (now) or VmHWM (most so far)."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True

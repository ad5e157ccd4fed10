"""The state of an unfinished training on disk: one file, replaced whole, read without unpickling code."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from stillroom.errors import FolderError
from stillroom.files import read_json, write_bytes
from stillroom.students.networks import CONFIG, WEIGHTS, Student

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.jsonl"
Standing = tuple[int, float, list[dict[str, Any]], dict[str, float]]


def save(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimiser: Any,
    step: int,
    seconds: float,
    history: Sequence[Mapping[str, Any]],
    seen: Mapping[str, float],
) -> None:
    """Everything that the next step depends on. The order of examples and all random draws follow from the step."""
    buffer = io.BytesIO()
    content = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
        "history": json.dumps(list(history)),
        "seen": dict(seen),
    }
    torch.save(content, buffer)
    write_bytes(folder / CHECKPOINT, buffer.getvalue())
    write_history(folder, history)


def load(folder: Path, modules: Mapping[str, nn.Module], optimiser: Any) -> Standing | None:
    """Put the last checkpoint back and say where it stood; None where there is none.

    Raises FolderError when it cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(content["modules"][name])
        optimiser.load_state_dict(content["optimiser"])
        return content["step"], content["seconds"], json.loads(content["history"]), content["seen"]
    except Exception as error:
        raise FolderError(f"{path} cannot be read ({error}). Delete it to train from the start.") from None


def write_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One line of JSON for each logged step."""
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in history)
    write_bytes(folder / HISTORY, lines.encode())


def finished(folder: Path) -> bool:
    """Whether the training in this folder ran to its end."""
    return (folder / CONFIG).is_file() and bool(read_json(folder / CONFIG).get("complete"))


def restored(student: Student, folder: Path) -> Student:
    """The finished student of a folder, in a copy of ``student``'s network."""
    trained = student.copy()
    trained.net.load_state_dict(load_file(folder / WEIGHTS))
    trained.net.eval()
    return trained


def discard(folder: Path) -> None:
    """Remove the checkpoint of a training that ended."""
    (folder / CHECKPOINT).unlink(missing_ok=True)

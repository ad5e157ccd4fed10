"""The folder of a training: what it says, the state of an unfinished one, and the student of a finished one.

The state is one file, replaced whole, and read without unpickling code.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stillroom import settings
from stillroom.digests import data_description, json_digest, state_digest
from stillroom.errors import FolderError
from stillroom.files import read_json, write_bytes
from stillroom.language import is_causal
from stillroom.plan import order_digest
from stillroom.students.networks import CONFIG, WEIGHTS, Student, load_student
from stillroom.types import Examples, identity_of

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Step:
    """What a watcher sees of a logged step. Loss and terms are averages over the whole batch, all ranks."""

    step: int  # counted from 0
    epoch: float  # passes over the examples before it
    loss: float  # before the step's update
    terms: Mapping[str, float]
    learning_rate: float
    examples: int  # seen before it
    rollouts: Mapping[str, float] = field(default_factory=dict)  # texts, tokens, truncated, degenerate; up to here


def about(
    student: Student, teacher: Any, examples: Examples, objective: Any, plan: Any, rollouts: Any = None
) -> dict[str, Any]:
    """What trains the student, as student.json says it; ``training`` is the digest of all of it."""
    manifest = getattr(teacher, "manifest", None)
    known = {
        "plan": settings.describe(plan),
        "objective": settings.describe(objective),
        "teacher": None if teacher is None else settings.describe(identity_of(teacher)),
        "recording": json_digest(manifest) if manifest else None,
        "data": data_description(examples),
        "initial_digest": state_digest(student.net.state_dict()),
        **({} if rollouts is None else {"rollouts": rollouts.about()}),
    }
    return {**known, "order_sha256": order_digest(plan, len(examples)), "training": json_digest(known)}


def save(
    folder: Path,
    parts: Mapping[str, Any],
    step: int,
    seconds: float,
    history: Sequence[Mapping[str, Any]],
    write: bool = True,
) -> None:
    """Everything that the next step depends on: the state of each part (networks, optimiser), and the step.

    The order of the examples and all random draws follow from the step. ``seconds`` of training so far. A rank that
    does not ``write`` only gives its part of the state.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    if not write:
        return
    buffer = io.BytesIO()
    torch.save({"state": state, "step": step, "seconds": seconds, "history": json.dumps(list(history))}, buffer)
    write_bytes(folder / CHECKPOINT, buffer.getvalue())
    write_history(folder, history)


def load(folder: Path, parts: Mapping[str, Any]) -> tuple[int, float, list[dict[str, Any]]]:
    """Put the last checkpoint back; where it stood: step, seconds, history. (0, 0.0, []) where there is none.

    Raises FolderError when it cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return 0, 0.0, []
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(content["state"][name])
        return content["step"], content["seconds"], json.loads(content["history"])
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError...: all mean the same to a user
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise FolderError(f"{path} cannot be read ({reason[0]}). Delete it to train from the start.") from None


def write_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One line of JSON for each logged step."""
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in history)
    write_bytes(folder / HISTORY, lines.encode())


def finished(folder: Path) -> bool:
    """Whether the training in this folder ran to its end."""
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS)) and bool(read_json(folder / CONFIG)["complete"])


def restored(student: Student, folder: Path) -> Student:
    """The finished student of a folder, in a copy of ``student``'s network. Raises FolderError for damaged weights."""
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise FolderError(f"{folder / WEIGHTS} is damaged ({error}). Delete it to train again.") from None
    if state_digest(state) != read_json(folder / CONFIG)["content_digest"]:
        raise FolderError(f"{folder / WEIGHTS} is not what was trained ({CONFIG} differs). Delete it to train again.")
    if is_causal(student.net):  # adapters are merged on disk, a tied head is kept once
        return dataclasses.replace(student, net=load_student(folder).net)
    trained = student.copy()
    trained.net.load_state_dict(state)
    trained.net.eval()
    return trained


def discard(folder: Path) -> None:
    """Remove the checkpoint of a training that ended."""
    (folder / CHECKPOINT).unlink(missing_ok=True)

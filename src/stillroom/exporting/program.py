"""A network as torch.export's program, for targets that convert it elsewhere: fixed shapes, one example at a time."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.errors import UsageError
from stillroom.exporting.apart import Apart
from stillroom.exporting.apart.process import ApartError
from stillroom.exporting.artifact import Tensors
from stillroom.exporting.shipped import Shipped
from stillroom.network import Columns
from stillroom.students.networks import Student


def refused(student: Student, tensors: Tensors) -> str | None:
    """Why a target of fixed shapes cannot take this student, with the alternative; None when it can."""
    if student.answers == "next_token":
        return "it is a language model, whose rows differ in length, and shapes are fixed here. Use gguf or onnx."
    for tensor in tensors:
        if not tensor.is_floating_point() and not isinstance(student.adapter, Columns):
            return "its token ids differ in length from text to text, and shapes are fixed here. Use onnx."
        if tensor.is_complex() or tensor.dtype == torch.float64:
            return f"an input is {str(tensor.dtype).removeprefix('torch.')}. Make it float32."
    return None


def write_program(student: Student, tensors: Tensors, path: Path) -> None:
    """torch.export's program of one example, as ``path``: JSON and raw numbers in a zip, no pickle.

    Raises UsageError with torch's reason when the network is no one graph of tensors.
    """
    shipped = Shipped(student.copy().net, student.answers).float().eval()
    one = tuple(tensor[:1].detach().cpu().contiguous() for tensor in tensors)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # torch 2.13 uses its own deprecated check while it copies an exported program.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            program = torch.export.export(shipped, one)
            program._example_inputs = None  # would be pickled
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.export.save(program, path)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"torch.export cannot take the network of {student.name!r}: {reason[:300].rstrip('.')}. Its forward must "
            "be one graph of tensors: no branching on values."
        ) from error


def columns_of(calibration: Iterable[Tensors]) -> dict[str, np.ndarray]:
    """All calibration inputs under 0, 1, ...: one array [N, ...] for each of the network's inputs."""
    batches = list(calibration)
    joined = [torch.cat(parts).detach().cpu() for parts in zip(*batches, strict=True)]
    return {str(index): column.numpy() for index, column in enumerate(joined)}


def convert_apart(
    title: str,
    script: tuple[str, Path],
    student: Student,
    tensors: Tensors,
    calibration: Iterable[Tensors],
    path: Path,
    precision: str,
    opened: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Let ``convert`` of a script (environment, file) write ``path``; the notes of what it said, and of its inputs.

    ``opened``: how the script opens it again, besides the path; None where nothing here can.
    Raises UsageError, with the library's reason, for a network that ``title`` cannot take.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"path": str(path.absolute())}
    with tempfile.TemporaryDirectory() as place, Apart(*script) as apart:
        program = Path(place) / "program.pt2"
        write_program(student, tensors, program)
        settings = {"program": str(program), **where, "precision": precision}
        try:
            said, _ = apart.call("convert", settings, columns_of(calibration))
            described = {} if opened is None else apart.ask({"open": {**where, **opened}}, {})[0]
        except ApartError as error:
            reason = str(error)[:600]
            raise UsageError(f"{title} cannot take the network of {student.name!r}: {reason} Use onnx.") from error
    return {**said, **described, "output": student.answers, "batch": 1}

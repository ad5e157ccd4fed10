"""Core ML: an .mlpackage, converted in the environment ``coreml``. Only macOS runs it, so nothing is proven here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stillroom.exporting import program
from stillroom.exporting.artifact import Tensors, Written
from stillroom.exporting.coreml import inside
from stillroom.students.networks import Student

PRECISIONS = ("fp16", "fp32")
SCRIPT = ("coreml", Path(inside.__file__))
WHY = "Core ML runs on macOS and iOS only: converted, not verified"


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """What Core ML cannot take of a student."""
    return program.refused(student, tensors)


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp16"
) -> Written:
    """Write the folder path.mlpackage (an ML program for iOS 16, macOS 13 and later), one example a call.

    Raises UsageError for a network that torch.export or the converter cannot take.
    """
    path = path.with_suffix(".mlpackage")
    notes = program.convert_apart("Core ML", SCRIPT, student, tensors, (), path, precision, opened=None)
    inputs = [
        {"name": f"input_{index}", "dtype": str(tensor.dtype).removeprefix("torch."), "shape": [1, *tensor.shape[1:]]}
        for index, tensor in enumerate(tensors)
    ]
    return Written(path, None, {**notes, "inputs": inputs}, main=inside.MAIN)

"""ExecuTorch: a .pte file for XNNPACK, lowered and opened in the environment ``executorch``. Shapes are fixed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stillroom.exporting import program
from stillroom.exporting.apart import Runtime
from stillroom.exporting.artifact import Tensors, Written
from stillroom.exporting.executorch import inside
from stillroom.students.networks import Student

PRECISIONS = ("fp32", "int8", "int8_dynamic")
ENVIRONMENT = "executorch"
SCRIPT = Path(inside.__file__)


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """What ExecuTorch cannot take of a student."""
    return program.refused(student, tensors)


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write path.pte; ``int8`` by PT2E with ranges from the calibration inputs, float inputs and outputs throughout.

    One example a call: a batch dimension that was free may come back narrowed. The first use makes the environment.
    Raises UsageError for a network that torch.export or the lowering cannot take.
    """
    path = path.with_suffix(".pte")
    notes = program.convert_apart(
        "ExecuTorch", (ENVIRONMENT, SCRIPT), student, tensors, calibration, path, precision, opened={}
    )
    return Written(path, open_model, notes)


def open_model(path: Path) -> Runtime:
    """The file in ExecuTorch's runtime, one thread, on the CPU."""
    return Runtime(ENVIRONMENT, SCRIPT, {"path": str(path.absolute())})

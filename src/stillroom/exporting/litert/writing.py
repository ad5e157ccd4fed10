"""LiteRT and TFLite Micro: a .tflite file, made and opened in the environment ``litert``.

Shapes are fixed: one example a call. ``int8`` has int8 inputs and outputs, so who calls it rounds: verify.json says the
scales, and ``open_model`` here does it. ``int8_dynamic`` keeps float inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stillroom.exporting import program
from stillroom.exporting.apart import Runtime
from stillroom.exporting.artifact import Tensors, Written
from stillroom.exporting.litert import inside
from stillroom.students.networks import Student

PRECISIONS = ("fp32", "int8", "int8_dynamic")
ENVIRONMENT = "litert"
SCRIPT = Path(inside.__file__)


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """What LiteRT cannot take of a student."""
    return program.refused(student, tensors)


def unsupported_micro(student: Student, tensors: Tensors, precision: str) -> str | None:
    """What TFLite Micro cannot take of a student: also int64, and int8 weights with float activations."""
    if precision == "int8_dynamic":
        return (
            "TFLite Micro has no operators with int8 weights and float activations ('Hybrid models are not "
            "supported'). Use int8."
        )
    if any(not tensor.is_floating_point() for tensor in tensors):
        return "TFLite Micro takes float inputs here, and one of these holds integers. Use litert or onnx."
    return program.refused(student, tensors)


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write path.tflite for LiteRT. The first use makes the environment (minutes).

    Raises UsageError for a network that torch.export or the converter cannot take.
    """
    return _written(student, tensors, calibration, path, precision, micro=False)


def write_micro(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write path.tflite for TFLite Micro: the same file, opened in that interpreter."""
    return _written(student, tensors, calibration, path, precision, micro=True)


def _written(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str, micro: bool
) -> Written:
    path, title = path.with_suffix(".tflite"), "TFLite Micro" if micro else "LiteRT"
    notes = program.convert_apart(
        title, (ENVIRONMENT, SCRIPT), student, tensors, calibration, path, precision, opened={"micro": micro}
    )
    return Written(path, open_micro if micro else open_model, notes)


def open_model(path: Path) -> Runtime:
    """The file in LiteRT, one thread, on the CPU."""
    return Runtime(ENVIRONMENT, SCRIPT, {"path": str(path.absolute()), "micro": False})


def open_micro(path: Path) -> Runtime:
    """The file in TFLite Micro's interpreter on this machine: its reference operators, not a microcontroller's."""
    return Runtime(ENVIRONMENT, SCRIPT, {"path": str(path.absolute()), "micro": True})

"""OpenVINO, for Intel's processors: it reads the ONNX file that ships. The only file that imports openvino."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UsageError, missing_extra
from stillroom.exporting.artifact import Run, Tensors, Written, versions_of
from stillroom.exporting.onnx import graph as onnx
from stillroom.students.networks import Student

PRECISIONS = ("fp32", "int8")
# OpenVINO computes in float32, as the file says, on every processor: by default it takes bfloat16 where there is some.
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write path.onnx; int8 is static, which OpenVINO runs in integers (quantise and dequantise around operators).

    Raises what the ONNX target raises, and MissingExtraError without the extra ``openvino``.
    """
    library()
    # a student that was trained in int8 has its own integers, and no second rounding
    static = precision == "int8" and student.rounding is None
    written = onnx.write(student, tensors, calibration, path, "int8_static" if static else precision)
    versions = {**written.notes["versions"], **versions_of("openvino")}
    return Written(written.path, open_model, {**written.notes, "versions": versions}, written.beside)


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """What the ONNX graph cannot hold, and language models."""
    library()
    if student.answers == "next_token":
        return "language models are not shipped to OpenVINO here. Use onnx, or gguf to decode fast"
    return onnx.unsupported(student, tensors, "int8_static" if precision == "int8" else precision)


def open_model(path: Path) -> Run:
    """The file in OpenVINO on the CPU, one thread: the network's input tensors, in their order, to its output."""
    core = library().Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", SETTINGS)
    request = compiled.create_infer_request()
    count = len(compiled.inputs)

    def run(tensors: Tensors) -> Tensor:
        if len(tensors) != count:
            raise UsageError(f"the artefact takes {count} inputs, but the adapter gives {len(tensors)}.")
        feed: dict[Any, Any] = {
            number: tensor.detach().cpu().to(_DTYPES[kind.get_element_type().get_type_name()]).contiguous().numpy()
            for number, (kind, tensor) in enumerate(zip(compiled.inputs, tensors, strict=True))
        }
        found = request.infer(feed)
        # the request's own memory is written again by the next answer
        return torch.from_numpy(found[compiled.outputs[0]].copy())

    return run


_DTYPES = {"f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "boolean": torch.bool}


def library() -> Any:
    """The openvino module. Raises MissingExtraError without it."""
    try:
        return importlib.import_module("openvino")
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "openvino", "openvino") from None

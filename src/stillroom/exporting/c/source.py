"""ONNX to C by emx-onnx-cgen: one file of source with its weights inside, a header, and a program that tries them.

No other file imports emx_onnx_cgen. Batch 1: a controller has one observation at a time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stillroom.errors import UsageError, missing_extra
from stillroom.exporting.artifact import Tensors, Written
from stillroom.exporting.c import guard
from stillroom.exporting.c.compiled import measured, open_c
from stillroom.exporting.onnx import graph as onnx
from stillroom.exporting.onnx.runtime import library
from stillroom.files import write_bytes
from stillroom.students.networks import Student

PRECISIONS = ("fp32", "int8")
RESERVED = ("model", "failed", "unverified")  # what export calls its own files


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """Why C cannot take it, with the alternative; None where it can."""
    if student.answers == "next_token":
        return "it is a language model, whose texts have any length. Use gguf (llama.cpp) or onnx."
    if len(tensors) != 1:
        return f"it takes {len(tensors)} inputs, and the C entry takes one array of floats. Use onnx."
    if not tensors[0].is_floating_point():
        kind = str(tensors[0].dtype).removeprefix("torch.")
        return f"its input is {kind} (tokens, ids), and the C entry takes floats. Use onnx."
    return None


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write path.c, and NAME.h and NAME_main.c beside it; every symbol begins with NAME, the student's name.

    ``NAME_run(in, out)`` refuses what is not finite; ``NAME_run_clamped`` and ``NAME_run_within`` know the ranges of
    the calibration inputs. The weights are in the source, and temporaries on the stack: nothing is allocated, ever.
    Raises UsageError for an operator that the generator does not know, MissingExtraError without the extra ``c``.
    """
    if not _has_generator():
        raise missing_extra("emx_onnx_cgen", "c")
    batches = list(calibration)
    name = symbol(student.name)
    with tempfile.TemporaryDirectory() as place:
        first = onnx.write(student, tensors, batches, Path(place) / "graph", precision)
        model, outputs = _one_row(library("onnx").load(first.path), student.name)
    network = _generate(model, name, student.name)
    low, high = _ranges(batches)
    source = network + guard.guard(name, low, high)
    path = path.with_suffix(".c")
    beside = path.parent / f"{name}.h", path.parent / f"{name}_main.c"
    write_bytes(path, source.encode())
    write_bytes(beside[0], guard.header(name, len(low), outputs).encode())
    write_bytes(beside[1], guard.harness(name, "model.c").encode())
    notes: dict[str, Any] = {key: first.notes[key] for key in ("inputs", "output", "quantisation")}
    notes["symbol"] = name
    notes["compiled"] = measured(path, name)
    notes["versions"] = {**first.notes["versions"], "emx-onnx-cgen": importlib.metadata.version("emx-onnx-cgen")}
    return Written(path, open_c, notes, beside)


def symbol(name: str) -> str:
    """The student's name as a C identifier that is not the name of one of export's own files."""
    found = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower() or "student"
    return f"net_{found}" if found[0].isdigit() or found.startswith(RESERVED) else found


def _has_generator() -> bool:
    return importlib.util.find_spec("emx_onnx_cgen") is not None


def _one_row(model: Any, student: str) -> tuple[Any, int]:
    """The graph for a batch of one, and how many numbers it answers with."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del graph.value_info[:]
    shape = [dimension.dim_value for dimension in graph.output[0].type.tensor_type.shape.dim]
    if len(shape) != 2 or not all(shape):
        raise UsageError(
            f"C gives one row of numbers, but {student!r} answers [batch, ...] of rank {len(shape)}. Use onnx."
        )
    return library("onnx").shape_inference.infer_shapes(model), math.prod(shape)


def _generate(model: Any, name: str, student: str) -> str:
    """C of the graph, all of it static, so that several students can be linked into one program."""
    from emx_onnx_cgen import CodegenError, Compiler, ShapeInferenceError, UnsupportedOpError
    from emx_onnx_cgen.compiler import CompilerOptions

    options = CompilerOptions(model_name=f"{name}_network", large_temp_threshold_bytes=0, large_weight_threshold=0)
    try:
        source = Compiler(options).compile(model)
    except (CodegenError, ShapeInferenceError, UnsupportedOpError) as error:
        raise UsageError(f"C cannot take the network of {student!r}: {error}. Use onnx.") from error
    source = re.sub(r"^extern const [^;]*;\n", "", source, flags=re.MULTILINE)
    source = re.sub(r"^const EMX_UNUSED", "static const EMX_UNUSED", source, flags=re.MULTILINE)
    source = re.sub(rf"^_Bool {name}_network_load\(.*?^}}\n", "", source, flags=re.MULTILINE | re.DOTALL)
    return re.sub(rf"^void {name}_network\(", f"static void {name}_network(", source, flags=re.MULTILINE)


def _ranges(batches: list[Tensors]) -> tuple[list[float], list[float]]:
    """The least and the largest of each input number over the calibration rows."""
    rows = torch.cat([batch[0].detach().cpu().float().flatten(1) for batch in batches])
    return rows.amin(0).tolist(), rows.amax(0).tolist()

"""ONNX, run by ONNX Runtime: float32 or int8, one file that needs neither stillroom nor PyTorch.

Writes the graph; ``int8`` rounds it and ``runtime`` runs it. No other file imports onnx or onnxruntime.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from stillroom import settings
from stillroom.errors import UsageError
from stillroom.exporting.artifact import Tensors, Written, versions_of
from stillroom.exporting.language.token_file import write_tokens
from stillroom.exporting.onnx.int8 import nothing_to_round, quantise, weights_alone
from stillroom.exporting.onnx.runtime import halved, library, open_language_model, open_model, plain, without_traces
from stillroom.exporting.onnx.trained import INT4_OPSET, own_zeros, pack_int4, with_integers
from stillroom.exporting.shipped import NextToken, Shipped
from stillroom.files import write_bytes
from stillroom.network import Columns
from stillroom.students.networks import Student

PRECISIONS = ("fp32", "int8", "int8_static", "int8_dynamic", "int4", "fp16")
OPSET = 20
LARGEST = 2**31  # bytes of a protobuf message


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write path.onnx with a free batch dimension, and a free second one for int64 inputs where the net allows it.

    A language model takes tokens and positions [B, T] and gives logits [B, T, V]; its tokenizer lies beside it.
    The same student gives the same bytes on one set of library versions. Raises UsageError for an unknown precision
    and for a network that ONNX cannot take.
    """
    library("onnx")
    _check_size(student)
    traced = _trace(student, tensors)
    path = path.with_suffix(".onnx")
    with _quiet():
        content, quantisation = _in_precision(traced, calibration, student, precision)
    write_bytes(path, content)
    inputs = [
        {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
        for name, tensor, shape in zip(traced.names, map(plain, tensors), traced.shapes, strict=True)
    ]
    notes: dict[str, Any] = {"opset": _opset(student), "inputs": inputs, "output": student.answers}
    notes["quantisation"] = quantisation
    notes["versions"] = versions_of("torch", "onnx", "onnxscript", "onnxruntime")
    if student.answers == "next_token" and student.tokenizer is not None:
        return Written(path, open_language_model, notes, write_tokens(student.tokenizer, path.parent))
    return Written(path, open_model, notes)


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """What the graph cannot hold: found by tracing it, which ``write`` then need not do again."""
    library("onnx")
    library("onnxruntime")
    try:
        _check_size(student)
        content = _trace(student, tensors).content
        return None if student.rounding is not None else nothing_to_round(content, precision)
    except UsageError as error:
        return str(error)


def _in_precision(
    traced: Traced, calibration: Iterable[Tensors], student: Student, precision: str
) -> tuple[bytes, dict[str, Any] | None]:
    if student.rounding is not None:  # the graph holds the integers that were trained
        return traced.content, {"method": "trained", **settings.describe(student.rounding)}
    if precision == "fp32":
        return traced.content, None
    if precision == "fp16":
        return halved(traced.content), None
    if precision == "int4":
        return weights_alone(traced.content, list(calibration), student.answers, bits=4)
    _, _, wanted = precision.partition("_")
    return quantise(traced.content, traced.names, calibration, student.answers, wanted or None)


def _opset(student: Student) -> int:
    return OPSET if student.rounding is None else INT4_OPSET


def _check_size(student: Student) -> None:
    size = sum(4 * parameter.numel() for parameter in student.net.parameters())
    if size >= LARGEST:
        raise UsageError(
            f"the weights of {student.name!r} are {size / 1e9:.1f} GB, and an ONNX file holds less than 2.1. Use gguf."
        )


def input_names(student: Student, count: int) -> tuple[str, ...]:
    """The names of the graph's inputs: the adapter's columns, else forward's parameters, else input_0, input_1, ..."""
    if isinstance(student.adapter, Columns) and len(student.adapter.names) == count:
        return student.adapter.names
    parameters = inspect.signature(student.net.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    return tuple(names) if len(names) == count else tuple(f"input_{index}" for index in range(count))


@dataclass(frozen=True)
class Traced:
    """The float32 graph as a file's content, its inputs' names, and their shapes: 'batch' and 'length' where free."""

    content: bytes
    names: tuple[str, ...]
    shapes: list[list[Any]]


# Every precision, OpenVINO and the browser begin with one graph, and tracing takes seconds: kept for as long as the
# network lives. Networks that are exported are copies that nothing trains.
_TRACED: WeakKeyDictionary[torch.nn.Module, Traced] = WeakKeyDictionary()


def _trace(student: Student, tensors: Tensors) -> Traced:
    """Raises UsageError for a network that is not one graph with a free batch dimension."""
    if student.net not in _TRACED:
        names, tensors = input_names(student, len(tensors)), tuple(plain(tensor) for tensor in tensors)
        with _quiet():
            model, shapes = _graph(student, tensors, names)
        _TRACED[student.net] = Traced(model.SerializeToString(deterministic=True), names, shapes)
    return _TRACED[student.net]


def _graph(student: Student, tensors: Tensors, names: Sequence[str]) -> tuple[Any, list[list[Any]]]:
    net = with_integers(student.copy().net)
    shipped = NextToken(net) if student.answers == "next_token" else Shipped(net, student.answers)
    shipped = shipped.float().eval()
    long = [tensor.dtype == torch.int64 and tensor.dim() == 2 and tensor.shape[1] > 1 for tensor in tensors]
    both = tuple({0: "batch", 1: "length"} if is_long else {0: "batch"} for is_long in long)
    batch_only = tuple({0: "batch"} for _ in tensors)
    problem: Exception | None = None
    for shapes in dict.fromkeys((str(both), str(batch_only))):
        chosen = both if shapes == str(both) else batch_only
        try:
            program = torch.onnx.export(
                shipped,
                tensors,
                input_names=list(names),
                output_names=[student.answers],
                dynamic_shapes=(chosen,),
                opset_version=_opset(student),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
            problem = problem or error
            continue
        assert program is not None
        shown = [[free.get(i, n) for i, n in enumerate(t.shape)] for t, free in zip(tensors, chosen, strict=True)]
        model = program.model_proto if student.rounding is None else own_zeros(pack_int4(program.model_proto))
        return without_traces(model), shown
    raise UsageError(
        f"{_first_reason(problem)}. The network's forward must be one graph of tensors with a free batch dimension: no "
        "branching on values, and no batch size written as a number."
    ) from problem


def _first_reason(problem: BaseException | None) -> str:
    """The innermost cause, in one line: the exporter wraps it in a page of advice."""
    while problem is not None and problem.__cause__ is not None:
        problem = problem.__cause__
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(problem).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of the exporters' own chatter (missing torchvision, skipped folding); errors are still logged."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            # torch 2.13 uses its own deprecated check while it copies an exported program.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            # Two inputs share the name of their batch dimension: that is what the name says.
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            yield
    finally:
        logging.disable(before)

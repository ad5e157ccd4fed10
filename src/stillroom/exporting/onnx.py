"""ONNX, run by ONNX Runtime: float32, or int8 by static or dynamic quantisation, whichever keeps more of the student.

The only file that imports onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UsageError, missing_extra, nearest
from stillroom.exporting.artifact import Run, Tensors, Written
from stillroom.exporting.shipped import NextToken, Shipped
from stillroom.exporting.token_file import WithTokens, write_tokens
from stillroom.files import write_bytes
from stillroom.network import Answers, Columns
from stillroom.students.networks import Student

PRECISIONS = ("fp32", "int8")
OPSET = 20
LARGEST = 2**31  # bytes of a protobuf message
# What becomes int8: the operators that hold weights, and pooling, which would otherwise leave int8 between two of them.
# Normalisation, reductions and masks stay in float32: they are small, and a count rounded to 8 bits is wrong.
QUANTISED = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "MaxPool"]
ATTENTION = {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "Attention", "Softmax"}
STATIC_PREFERRED_WITHIN = 0.02  # a dynamic convolution (ConvInteger) runs about four times slower than a static one


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write path.onnx with a free batch dimension, and a free second one for int64 inputs where the net allows it.

    A language model takes tokens and positions [B, T] and gives logits [B, T, V]; its tokenizer lies beside it.
    The same student gives the same bytes on one set of library versions. Raises UsageError for an unknown precision
    and for a network that ONNX cannot take.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"onnx has no precision {precision!r}{nearest(precision, PRECISIONS)}")
    _library("onnx")
    _check_size(student)
    names = input_names(student, len(tensors))
    tensors = tuple(_plain(tensor) for tensor in tensors)
    path = path.with_suffix(".onnx")
    with _quiet():
        model, dynamic = _trace(student, tensors, names)
        content, quantisation = model.SerializeToString(deterministic=True), None
        if precision == "int8":
            content, quantisation = quantise(content, names, calibration, student.answers)
    write_bytes(path, content)
    inputs = [
        {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
        for name, tensor, shape in zip(names, tensors, dynamic, strict=True)
    ]
    libraries = ("torch", "onnx", "onnxscript", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    notes: dict[str, Any] = {"opset": OPSET, "inputs": inputs, "output": student.answers, "quantisation": quantisation}
    notes["versions"] = versions
    if student.answers == "next_token" and student.tokenizer is not None:
        return Written(path, open_language_model, notes, write_tokens(student.tokenizer, path.parent))
    return Written(path, open_model, notes)


def _check_size(student: Student) -> None:
    size = sum(4 * parameter.numel() for parameter in student.net.parameters())
    if size >= LARGEST:
        raise UsageError(
            f"the weights of {student.name!r} are {size / 1e9:.1f} GB, and an ONNX file holds less than 2.1. Use gguf."
        )


def open_model(path: Path, threads: int = 1) -> Run:
    """The file in ONNX Runtime on the CPU: the network's input tensors, in their order, to its output."""
    return _run_of(str(path), threads)


def open_language_model(path: Path) -> WithTokens:
    """A language model's file, and the tokenizer beside it."""
    return WithTokens(open_model(path), path.parent)


def input_names(student: Student, count: int) -> tuple[str, ...]:
    """The names of the graph's inputs: the adapter's columns, else forward's parameters, else input_0, input_1, ..."""
    if isinstance(student.adapter, Columns) and len(student.adapter.names) == count:
        return student.adapter.names
    parameters = inspect.signature(student.net.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    return tuple(names) if len(names) == count else tuple(f"input_{index}" for index in range(count))


def _trace(student: Student, tensors: Tensors, names: Sequence[str]) -> tuple[Any, list[list[Any]]]:
    """The ONNX model, and its inputs' shapes with 'batch' and 'length' where they are free."""
    net = student.copy().net
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
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
            problem = problem or error
            continue
        assert program is not None
        shown = [[free.get(i, n) for i, n in enumerate(t.shape)] for t, free in zip(tensors, chosen, strict=True)]
        return _without_traces(program.model_proto), shown
    raise UsageError(
        f"ONNX cannot take the network of {student.name!r}: {_first_reason(problem)}. Its forward must be one graph of "
        "tensors with a free batch dimension: no branching on values, and no batch size written as a number."
    ) from problem


def _without_traces(model: Any) -> Any:
    """The model without the exporter's notes: they hold source lines and this machine's paths."""
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph, model):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def _first_reason(problem: BaseException | None) -> str:
    """The innermost cause, in one line: the exporter wraps it in a page of advice."""
    while problem is not None and problem.__cause__ is not None:
        problem = problem.__cause__
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(problem).__name__


def quantise(
    content: bytes, names: Sequence[str], calibration: Iterable[Tensors], answers: Answers
) -> tuple[bytes, dict[str, Any]]:
    """The int8 model, and which way was chosen, why, and what each candidate kept on the calibration inputs.

    Transformers: dynamic (their activations have outliers that a fixed range cuts). Convolutions: static, unless it
    keeps clearly less. Everything else: whichever keeps more, then whichever is smaller.
    """
    onnx = _library("onnx")
    batches = list(calibration)
    operators = {node.op_type for node in onnx.load_from_string(content).graph.node}
    if not operators & set(QUANTISED):
        raise UsageError(f"there is nothing to make int8: the network has no {', '.join(QUANTISED[:-1])}. Use fp32.")
    attends, convolves = bool(operators & ATTENTION), bool(operators & {"Conv", "ConvTranspose"})
    why = "transformer" if attends else "convolution" if convolves else "measured"
    with tempfile.TemporaryDirectory() as place:
        prepared = _prepare(content, Path(place))
        reference = _run_of(content)
        made: dict[str, bytes] = {}
        measured: dict[str, dict[str, float]] = {}
        for method in ("dynamic",) if attends else ("static", "dynamic"):
            made[method] = _quantised(prepared, Path(place) / f"{method}.onnx", method, names, batches)
            kept = _kept(reference, _run_of(made[method]), batches, answers)
            measured[method] = {"kept": kept, "bytes": len(made[method])}
    method = max(measured, key=lambda name: (measured[name]["kept"], -measured[name]["bytes"]))
    if convolves and not attends and measured["static"]["kept"] >= measured[method]["kept"] - STATIC_PREFERRED_WITHIN:
        method = "static"
    rows = sum(len(batch[0]) for batch in batches)
    return made[method], {"method": method, "why": why, "candidates": measured, "calibration_rows": rows}


def _prepare(content: bytes, place: Path) -> Path:
    """The model after ONNX Runtime's own preparation: shapes inferred, constants folded."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = place / "fp32.onnx", place / "prepared.onnx"
    source.write_bytes(content)
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception:  # symbolic shape inference gives up on some graphs with bare exceptions; it is optional
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    return prepared


def _quantised(prepared: Path, path: Path, method: str, names: Sequence[str], batches: list[Tensors]) -> bytes:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(batches)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            batch = next(self.rows, None)
            return None if batch is None else {n: _plain(t).numpy() for n, t in zip(names, batch, strict=True)}

    if method == "dynamic":
        quantize_dynamic(str(prepared), str(path), weight_type=QuantType.QInt8)
    else:
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    model = _library("onnx").load(path)
    return _without_traces(model).SerializeToString(deterministic=True)


def _kept(reference: Run, candidate: Run, batches: list[Tensors], answers: Answers) -> float:
    """Top-1 agreement of logits, or 1 - relative root mean square error of values, on the calibration inputs."""
    same, places, error, total = 0, 0, 0.0, 0.0
    for batch in batches:
        ours, theirs = reference(batch), candidate(batch)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        places += ours[..., 0].numel()
        error += float((ours - theirs).square().sum())
        total += float(ours.square().sum())
    return 1 - (error / max(total, 1e-30)) ** 0.5 if answers == "values" else same / max(places, 1)


def _run_of(model: bytes | str, threads: int = 1) -> Run:
    """One thread by default: the same answers and comparable times on every machine."""
    runtime = _library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = [(found.name, _DTYPES.get(found.type)) for found in session.get_inputs()]

    def run(tensors: Tensors) -> Tensor:
        if len(tensors) != len(wanted):
            raise UsageError(f"the artefact takes {len(wanted)} inputs, but the adapter gives {len(tensors)}.")
        pairs = zip(wanted, tensors, strict=True)
        feed = {name: tensor.detach().cpu().to(dtype or tensor.dtype).numpy() for (name, dtype), tensor in pairs}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, float32 for every floating type: what a shipped network takes."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _library(name: str) -> Any:
    import importlib

    try:
        if name == "onnx":
            importlib.import_module("onnxscript")  # what torch.onnx writes with
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or name, "onnx") from None


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

"""ONNX Runtime on the CPU: a file, or its content, as a function of tensors. Loads what the extra ``onnx`` brings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UsageError, missing_extra
from stillroom.exporting.artifact import Run, Tensors
from stillroom.exporting.language.token_file import WithTokens

EXACT = ("session.x64quantprecision", "1")  # a setting that whoever runs int8 on such a machine needs too


def open_model(path: Path, threads: int = 1) -> Run:
    """The file in ONNX Runtime on the CPU: the network's input tensors, in their order, to its output."""
    return run_of(str(path), threads)


def open_language_model(path: Path) -> WithTokens:
    """A language model's file, and the tokenizer beside it."""
    return WithTokens(open_model(path), path.parent)


def run_of(model: bytes | str, threads: int = 1) -> Run:
    """One thread by default: the same answers and comparable times on every machine."""
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    # int8 on x86 without VNNI: by default pairs of products are added in 16 bits, which saturate (errors of 10 %)
    options.add_session_config_entry(*EXACT)
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


def plain(tensor: Tensor) -> Tensor:
    """On the CPU, float32 for every floating type: what a shipped network takes."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def library(name: str) -> Any:
    """A module of the extra ``onnx``. Raises MissingExtraError without it."""
    try:
        if name == "onnx":
            importlib.import_module("onnxscript")  # what torch.onnx writes with
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or name, "onnx") from None


def halved(content: bytes) -> bytes:
    """The model with its numbers in float16 but those it takes and gives; for size, since CPUs compute in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(library("onnx").load_from_string(content), keep_io_types=True)
    return without_traces(model).SerializeToString(deterministic=True)


def without_traces(model: Any) -> Any:
    """The model without the exporter's notes: they hold source lines and this machine's paths."""
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph, model):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model

"""What runs in the environment ``executorch``: lowering to XNNPACK, PT2E rounding, its runtime. Knows no stillroom."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
LIBRARIES = ("torch", "executorch", "torchao")


def convert(settings: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """``program`` (a .pt2 that torch.export wrote) as the .pte file ``path``, in ``precision``.

    ``arrays``: the calibration inputs 0, 1, ... [N, ...], one column for each of the network's inputs.
    """
    import torch

    torch.set_num_threads(1)
    columns = [torch.from_numpy(arrays[str(index)].copy()) for index in range(len(arrays))]
    program = torch.export.load(settings["program"])
    with torch.no_grad():
        if settings["precision"] != "fp32":
            program = _rounded(program, columns, dynamic=settings["precision"] == "int8_dynamic")
        exir = importlib.import_module("executorch.exir")
        partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()])
        _check_fixed(lowered.exported_program())
        Path(settings["path"]).write_bytes(lowered.to_executorch().buffer)
    calls = [str(node.target) for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    delegated = sum("executorch_call_delegate" in name for name in calls)
    outside = sorted({name for name in calls if "delegate" not in name and "getitem" not in name})
    return {
        "delegates": {"xnnpack": delegated, "operators_outside": outside},
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }, {}


def _check_fixed(program: Any) -> None:
    """Every shape that goes in or out is a number: a dimension that is free may be narrowed without a word."""
    ends = [node for node in program.graph.nodes if node.op in ("placeholder", "output")]
    for node in ends:
        values = [node.meta.get("val")] if node.op == "placeholder" else [arg.meta.get("val") for arg in node.args[0]]
        for shape in (value.shape for value in values if hasattr(value, "shape")):
            if any(not isinstance(size, int) for size in shape):
                raise ValueError(
                    f"lowering left the shape {list(shape)} of {node.name} open: {program.range_constraints}"
                )


def _rounded(program: Any, columns: list[Any], dynamic: bool) -> Any:
    """PyTorch 2's own quantisation of the graph, by XNNPACK's rules: int8 per output channel."""
    import torch

    quantizing = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    how = quantizing.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    prepared = pt2e.prepare_pt2e(program.module(), quantizing.XNNPACKQuantizer().set_global(how))
    for row in range(len(columns[0])):  # the shapes are those of one example
        prepared(*(column[row : row + 1] for column in columns))
    return torch.export.export(pt2e.convert_pt2e(prepared), tuple(column[:1] for column in columns))


def open_model(settings: dict[str, Any]) -> tuple[Callable[[list[np.ndarray]], np.ndarray], dict[str, Any]]:
    """The file ``path`` in ExecuTorch's runtime, and the inputs that it takes."""
    import torch

    torch.set_num_threads(1)
    runtime = importlib.import_module("executorch.runtime")
    method = runtime.Runtime.get().load_program(Path(settings["path"])).load_method("forward")
    meta = method.metadata
    kinds = {1: "uint8", 2: "int16", 3: "int32", 4: "int64", 6: "float32", 11: "bool"}  # ExecuTorch's ScalarType
    inputs = []
    for index in range(meta.num_inputs()):
        found = meta.input_tensor_meta(index)
        inputs.append({"name": f"input_{index}", "dtype": kinds[found.dtype()], "shape": list(found.sizes())})

    def run(arrays: list[np.ndarray]) -> np.ndarray:
        (answer,) = method.execute([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays])
        return answer.numpy().copy()  # the runtime uses its memory again

    return run, {"inputs": inputs}

"""What runs in the environment ``coreml``: the conversion. Knows no stillroom."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
LIBRARIES = ("torch", "coremltools")
MAIN = "Data/com.apple.CoreML/model.mlmodel"  # of an .mlpackage; its weights lie beside it


def convert(settings: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """``program`` (a .pt2 that torch.export wrote) as the .mlpackage ``path``; inputs are input_0, input_1, ..."""
    import torch

    coreml = importlib.import_module("coremltools")
    program = torch.export.load(settings["program"]).run_decompositions({})
    names = program.graph_signature.user_inputs
    shapes = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.name in names}
    model = coreml.convert(
        program,
        inputs=[coreml.TensorType(name=f"input_{i}", shape=tuple(shapes[name])) for i, name in enumerate(names)],
        outputs=[coreml.TensorType(name="output")],
        convert_to="mlprogram",
        compute_precision=getattr(coreml.precision, {"fp16": "FLOAT16", "fp32": "FLOAT32"}[settings["precision"]]),
        minimum_deployment_target=coreml.target.iOS16,
        skip_model_load=True,
    )
    model.save(settings["path"])
    return {"versions": {name: metadata.version(name) for name in LIBRARIES}}, {}

"""The targets that students ship to, by name: one line for each, and the folder or file that it is made of."""

from __future__ import annotations

from pathlib import Path

from stillroom import settings
from stillroom.errors import UsageError, nearest
from stillroom.exporting import openvino
from stillroom.exporting.artifact import Exporter, Target
from stillroom.exporting.c import source as c
from stillroom.exporting.coreml import writing as coreml
from stillroom.exporting.executorch import writing as executorch
from stillroom.exporting.gguf import writing as gguf
from stillroom.exporting.language import huggingface
from stillroom.exporting.litert import writing as litert
from stillroom.exporting.onnx import graph as onnx
from stillroom.exporting.web import writing as web

# An exporter is one function; a user's own is named 'my_file.py:my_exporter' or put in here.
TARGETS: dict[str, Target] = {
    "onnx": Target(onnx.write, onnx.PRECISIONS, onnx.unsupported, ("onnxruntime",), keeps_rounding=True),
    "c": Target(c.write, c.PRECISIONS, c.unsupported, keeps_rounding=True),
    "openvino": Target(
        openvino.write, openvino.PRECISIONS, openvino.unsupported, ("openvino", "onnxruntime"), keeps_rounding=True
    ),
    "web": Target(web.write, web.PRECISIONS, web.unsupported, keeps_rounding=True),
    "gguf": Target(gguf.write, gguf.PRECISIONS, modules=("xllamacpp",)),
    "huggingface": Target(huggingface.write, huggingface.PRECISIONS, huggingface.unsupported, ("transformers",)),
    "litert": Target(litert.write, litert.PRECISIONS, litert.unsupported),
    "tflm": Target(litert.write_micro, litert.PRECISIONS, litert.unsupported_micro),
    "executorch": Target(executorch.write, executorch.PRECISIONS, executorch.unsupported),
    "coreml": Target(coreml.write, coreml.PRECISIONS, coreml.unsupported, unproven=coreml.WHY),
}


def target_of(target: str, precision: str, base: Path | None = None) -> Target:
    """The target of a name, or a user's own exporter, which takes any precision and is looked up from ``base``.

    Raises UsageError with what there is.
    """
    if target in TARGETS:
        known = TARGETS[target].precisions
        if precision not in known:
            raise UsageError(f"{target} has no precision {precision!r}{nearest(precision, known)}")
        return TARGETS[target]
    if ":" in target:
        write: Exporter = settings.resolve(target, base)
        return Target(write, (precision,), keeps_rounding=True)
    raise UsageError(f"there is no export target {target!r}{nearest(target, TARGETS)}")


def label_of(target: str) -> str:
    """How a target is called in titles and folders: its name, or that of the user's own function."""
    return target.rpartition(":")[2]

"""The folder that transformers loads: weights, configuration, tokenizer and chat template."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UsageError
from stillroom.exporting.artifact import Tensors, Written, versions_of
from stillroom.language import is_causal, load_causal, next_token, write_folder
from stillroom.students.networks import Student

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = tuple(DTYPES)


def write(
    student: Student, tensors: Tensors, calibration: Iterable[Tensors], path: Path, precision: str = "fp32"
) -> Written:
    """Write the folder ``path``, for AutoModelForCausalLM.from_pretrained.

    Raises UsageError for a student that is no language model.
    """
    refusal = unsupported(student, tensors, precision)
    if refusal is not None:
        raise UsageError(refusal)
    net = student.net if precision == "fp32" else copy.deepcopy(student.net).to(DTYPES[precision])
    write_folder(net, student.tokenizer, path)
    inputs = [{"name": name, "dtype": "int64", "shape": ["batch", "length"]} for name in ("tokens", "positions")]
    versions = versions_of("torch", "transformers")
    return Written(path, open_folder, {"inputs": inputs, "output": "next_token", "versions": versions})


def unsupported(student: Student, tensors: Tensors, precision: str) -> str | None:
    """Only a language model with its tokenizer makes such a folder."""
    if is_causal(student.net) and student.tokenizer is not None:
        return None
    return (
        f"huggingface takes a language model with its tokenizer; {student.name!r} answers {student.answers}. Use onnx"
    )


class Folder:
    """The folder opened by transformers, in the precision it is written in."""

    def __init__(self, path: Path) -> None:
        loaded = load_causal(path, dtype=_dtype_of(path))
        self.net, self.tokenizer = loaded.net, loaded.tokenizer

    @torch.no_grad()
    def __call__(self, tensors: Tensors) -> Tensor:
        """Logits [B, T, V] for tokens and positions [B, T]; a document starts where the position is 0."""
        return next_token(self.net, *tensors).compute().float()

    def token_ids(self, text: str) -> Sequence[int]:
        """The ids of a text, marks read as such, by the tokenizer in the folder."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def open_folder(path: Path) -> Folder:
    """The folder in transformers, on the CPU."""
    return Folder(path)


def _dtype_of(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype

"""A student that is trained in the integers it ships with: fit gives it the rounding's own errors to learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import DataError, UsageError
from stillroom.students.networks import Student
from stillroom.students.rounding import Precision, Rounding, range_of, round_layers, rounded_layers, unround_layers
from stillroom.types import Examples, check_batch_of

ROWS = 256  # of inputs, spread evenly, that fix the ranges of activations
BATCH = 32
NUMBERS = 1 << 18  # kept of each layer's inputs, at most


def quantised(
    student: Student, precision: Precision = "int8", examples: Examples | None = None, *, group: int = 32
) -> Student:
    """A copy of ``student`` whose linear layers and convolutions compute with int8 or int4, for ``fit`` to go on with.

    Train in float first, then a short while rounded, from the same recording: gradients pass the rounding (straight
    through), so the weights settle where rounding harms least. Without training it is post-training quantisation.
    ``export`` ships exactly these integers and scales (ONNX, the precision of the same name).

    int8: weights per output channel, each layer's input with one scale, fixed by up to 256 of ``examples`` (the inputs
    of the recording) so that the squared error is least. int4: weights alone, in groups of ``group`` inputs of linear
    layers where that divides them, else per output channel.

    Raises UsageError for a network without such layers, one that is rounded already, a language model in int8, or int8
    without ``examples``; DataError when a layer's inputs are not finite.
    """
    if student.rounding is not None:
        raise UsageError(f"{student.name!r} is {student.rounding.precision} already. Start from the float student.")
    rounding = Rounding(precision, group)
    if precision == "int8" and student.answers == "next_token":
        raise UsageError("a language model loses next to nothing in int8: export it so. Train it in int4.")
    if precision == "int8" and examples is None:
        raise UsageError("int8 fixes the ranges of activations by inputs: pass examples=, those of the recording.")
    made = student.copy()
    round_layers(made.net, rounding)
    if precision == "int8":
        assert examples is not None
        _fix_ranges(student, made, examples)
    return dataclasses.replace(made, rounding=rounding)


def unrounded(student: Student) -> Student:
    """A float copy of a rounded student: the values that its integers stand for; what layers are given is not rounded.

    For runtimes that round by their own rules: their scales are near these, and their answers near the student's.
    """
    made = student.copy()
    unround_layers(made.net)
    return dataclasses.replace(made, rounding=None)


@torch.no_grad()
def _fix_ranges(student: Student, made: Student, examples: Examples) -> None:
    """Give every rounded layer the scale of its input, as the float student sees it on the examples."""
    float_net = made.copy().net  # batch normalisation folded, as in ``made``
    seen: dict[str, list[Tensor]] = {name: [] for name in rounded_layers(float_net)}
    hooks = []
    for name, layer in rounded_layers(float_net).items():
        layer.__class__ = type(layer).__mro__[1]
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].cpu())))
    watched = dataclasses.replace(student, net=float_net, features=())
    for batch in _batches(examples):
        watched.predict(batch)
    for name, layer in rounded_layers(made.net).items():
        if not seen[name]:
            raise UsageError(f"the network never calls {name!r}, so its range is unknown. Remove that layer.")
        numbers = torch.cat([_thinned(part, len(seen[name])) for part in seen[name]])
        if not numbers.isfinite().all():
            raise DataError(f"the inputs of {name!r} are not finite on the examples. Look for extreme inputs.")
        scale, zero = range_of(numbers)
        layer.rounded.scale.fill_(scale)
        layer.rounded.zero.fill_(zero)


def _thinned(part: Tensor, parts: int) -> Tensor:
    flat = part.float().flatten()
    extremes = torch.stack([flat.min(), flat.max()])
    return torch.cat([extremes, flat[:: max(1, flat.numel() * parts // NUMBERS)]])


def _batches(examples: Examples) -> Iterable[Any]:
    count = check_batch_of(examples)
    rows = [index * count // min(count, ROWS) for index in range(min(count, ROWS))]
    for start in range(0, len(rows), BATCH):
        yield examples.batch(rows[start : start + BATCH], None)

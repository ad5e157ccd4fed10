"""Per-example statistics of models that give values: labels [B, ...] float, NaN = unlabelled. NaN rows do not count."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional import r2_score

from stillroom.errors import DataError, ShapeError
from stillroom.measures.sums import sums_of
from stillroom.types import Batch, Signal


def _values_and_labels(student: Signal, batch: Batch, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, labels, and which elements count, each [B, E]."""
    values = student.need_values(what)
    values = values.reshape(len(batch), -1).double()
    if batch.labels is None:
        raise DataError(f"example {batch.ids[0]!r} has no label, and {what} needs labels. Give labelled examples.")
    labels = batch.labels.to(values.device).reshape(len(batch), -1).double()
    if labels.shape != values.shape:
        raise ShapeError(f"labels have shape {list(batch.labels.shape)}, but the answers {list(values.shape)}.")
    return values, labels, ~labels.isnan() & _unmasked(batch, values)


def _unmasked(batch: Batch, values: Tensor) -> Tensor:
    if batch.mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    mask = batch.mask.to(values.device).reshape(len(batch), -1)
    if values.shape[1] % mask.shape[1]:
        raise ShapeError(
            f"the mask has shape {list(batch.mask.shape)}, which does not fit values {list(values.shape)}."
        )
    return mask.repeat_interleave(values.shape[1] // mask.shape[1], dim=1)


def absolute_error(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The mean of |answer - label|, in the label's unit."""
    values, labels, counted = _values_and_labels(student, batch, "mae")
    return sums_of((values - labels).abs(), counted)


def squared_error(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The root of the mean of (answer - label)^2, in the label's unit."""
    values, labels, counted = _values_and_labels(student, batch, "rmse")
    return sums_of((values - labels).square(), counted)


def worst_error(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The largest |answer - label| of any example, in the label's unit."""
    values, labels, counted = _values_and_labels(student, batch, "largest error")
    worst = (values - labels).abs().masked_fill(~counted, float("-inf")).amax(-1, keepdim=True)
    return worst.masked_fill(worst == float("-inf"), float("nan"))


def largest(statistics: Tensor) -> float:
    """The maximum over examples."""
    return float(statistics.max())


def answers_and_labels(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """1 - sum (label - answer)^2 / sum (label - mean label)^2, averaged over outputs."""
    values, labels, counted = _values_and_labels(student, batch, "R2")
    both = torch.cat([values, labels], -1)
    return both.masked_fill(~counted.all(-1, keepdim=True), float("nan"))


def r2(statistics: Tensor) -> float:
    """R2 of (answers, labels) [N, 2D], averaged over the D outputs; NaN for fewer than two examples."""
    if len(statistics) < 2:
        return math.nan
    answers, labels = statistics.chunk(2, dim=-1)
    return float(r2_score(answers, labels))


def distance_to_teacher(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The mean of |answer - the teacher's answer|, in the label's unit."""
    ours = student.need_values("distance to the teacher").reshape(len(batch), -1).double()
    theirs = teacher.need_values("distance to the teacher").to(ours.device).reshape(len(batch), -1).double()
    if ours.shape != theirs.shape:
        raise ShapeError(f"the student answers {list(ours.shape)}, the teacher {list(theirs.shape)}.")
    counted = _unmasked(batch, ours)
    if batch.labels is not None and batch.labels.is_floating_point() and batch.labels.numel() == ours.numel():
        counted = counted & ~batch.labels.to(ours.device).reshape(ours.shape).isnan()
    return sums_of((ours - theirs).abs(), counted)

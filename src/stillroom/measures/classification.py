"""Per-example statistics of models that give logits: labels [B] or [B, T] int64, -100 = unlabelled.

A row of NaN does not count: an unlabelled example, a masked one, or one that a metric cannot judge. What compares with
the teacher is over the labelled examples too, so that all numbers of a report are of the same examples. Logits are
only looked at where a position counts, by chunks: [B, T, V] is never all there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from stillroom.divergences import Divergence, forward_kl
from stillroom.errors import DataError, ShapeError
from stillroom.measures.reading import Read, counted_of, device_of, read
from stillroom.measures.sums import sums_at
from stillroom.types import Batch, Logits, Signal, Sparse

BINS = 15  # of the calibration error; Guo et al. 2017


def labelled(student: Signal, batch: Batch, what: str) -> tuple[Read, Tensor, Tensor]:
    """What the model says at the positions that count [n], the labels there [n], and which they are [...] bool.

    Raises DataError without labels, ShapeError when they are not of these positions.
    """
    logits = student.need_logits(what)
    if batch.labels is None:
        raise DataError(f"example {batch.ids[0]!r} has no label, and this metric needs labels. Give labelled examples.")
    if batch.labels.shape != logits.shape:
        raise ShapeError(
            f"labels have shape {list(batch.labels.shape)}, but the answers have positions {list(logits.shape)}."
        )
    counted = counted_of(batch, logits)
    return read(logits, batch), batch.labels.to(counted.device)[counted], counted


def correct(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """1 where the most probable class is the label, else 0; averaged over labelled positions."""
    said, labels, counted = labelled(student, batch, "accuracy")
    return sums_at(said.top == labels, counted)


def surprise(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """-log p(label) in nats, averaged over labelled positions. Raises DataError for a label that the model lacks."""
    said, labels, counted = labelled(student, batch, "nll")
    vocabulary = student.need_logits().vocabulary
    wrong = (labels < 0) | (labels >= vocabulary)
    if wrong.any():
        raise DataError(
            f"label {int(labels[wrong][0])} is outside the {vocabulary} ids of the model. "
            "Check the class order and the vocabulary; unlabelled positions are -100."
        )
    assert said.label_log_probs is not None
    return sums_at(-said.label_log_probs, counted)


def predicted_and_label(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The mean over classes of the F1 of (predicted, label); a class that is in neither is left out."""
    said, labels, counted = labelled(student, batch, "macro F1")
    if counted.ndim != 1:
        raise ShapeError(f"macro F1 needs one label per example; these answers have positions {list(counted.shape)}.")
    rows = torch.full((len(counted), 2), float("nan"), dtype=torch.float64, device=counted.device)
    rows[counted] = torch.stack([said.top, labels], -1).double()
    return rows


def macro_f1(statistics: Tensor) -> float:
    """The unweighted mean of 2 tp / (2 tp + fp + fn) over the classes that are predicted or labels."""
    predicted, label = statistics.long().unbind(-1)
    classes = max(2, int(statistics.max()) + 1)
    return float(multiclass_f1_score(predicted, label, num_classes=classes, average="macro", validate_args=False))


def confidence_bins(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """|confidence - accuracy| in 15 equal bins of confidence, weighted by their counts (Guo et al. 2017, eq. 3).

    [B, 3 x 15]: in each bin the positions of an example, the sum of their confidences, and how many are right.
    """
    said, labels, counted = labelled(student, batch, "calibration error")
    confidence = said.confidence.double().clamp(max=1.0)
    example = counted.nonzero()[:, 0]
    place = example * BINS + (confidence * BINS).long().clamp(0, BINS - 1)
    kinds = (torch.ones_like(confidence), confidence, (said.top == labels).double())
    sums = [torch.zeros(len(batch) * BINS, dtype=torch.float64, device=counted.device) for _ in kinds]
    for total, kind in zip(sums, kinds, strict=True):
        total.index_add_(0, place, kind)
    rows = torch.cat([total.reshape(len(batch), BINS) for total in sums], -1)
    return rows.masked_fill(~counted.reshape(len(batch), -1).any(-1, keepdim=True), float("nan"))


class CalibrationError:
    """Sum over bins of (count / N) |accuracy - mean confidence|; Guo et al. 2017, eq. 3."""

    def __call__(self, statistics: Tensor) -> float:
        return float(self.of_sums(statistics.double().sum(0).numpy()))

    def of_sums(self, sums: np.ndarray) -> np.ndarray:
        """Of sums [..., 3 x 15]: what makes its bootstrap fast."""
        count, confidence, right = np.split(sums, 3, axis=-1)
        with np.errstate(invalid="ignore"):
            return np.abs(right - confidence).sum(-1) / count.sum(-1)


def agrees(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """1 where the most probable class is the teacher's, else 0."""
    ours, theirs, counted = compared(student, teacher, batch, "agreement")
    return sums_at(read(ours, batch).top == _top_at(theirs, batch, counted), counted)


def agrees_within_few(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """1 where the teacher's most probable class is among the model's five most probable, else 0."""
    ours, theirs, counted = compared(student, teacher, batch, "top-5 agreement")
    few = read(ours, batch).few
    return sums_at((few == _top_at(theirs, batch, counted).unsqueeze(-1)).any(-1), counted)


def compared(student: Signal, teacher: Signal, batch: Batch, what: str) -> tuple[Logits, Logits, Tensor]:
    """The logits of both and the positions [...] bool that count. Raises ShapeError when their positions differ."""
    ours, theirs = student.need_logits(what), teacher.need_logits(what)
    if ours.shape != theirs.shape:
        raise ShapeError(f"the model answers at positions {list(ours.shape)}, the teacher at {list(theirs.shape)}.")
    return ours, theirs, counted_of(batch, ours)


def _top_at(theirs: Logits, batch: Batch, counted: Tensor) -> Tensor:
    return read(theirs, batch).top.to(counted.device)


@dataclass(frozen=True)
class Against:
    """A divergence from the teacher, averaged over positions.

    NaN where it cannot be known: a model whose own answers are Sparse, draws and anything but forward KL.
    """

    divergence: Divergence

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Tensor:
        ours, theirs, counted = compared(student, teacher, batch, "a divergence")
        unknown = isinstance(theirs, Sparse) and theirs.sampled and self.divergence is not forward_kl
        if isinstance(ours, Sparse) or unknown:
            return torch.full((len(batch), 2), float("nan"), dtype=torch.float64)
        values = self.divergence(ours[counted], theirs[counted.to(device_of(theirs))])
        return sums_at(values, counted)

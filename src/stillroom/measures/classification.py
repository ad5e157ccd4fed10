"""Per-example statistics of models that give logits: labels [B] or [B, T] int64, -100 = unlabelled.

A row of NaN does not count: an unlabelled example, a masked one, or one that a metric cannot judge. What compares with
the teacher is over the labelled examples too, so that all numbers of a report are of the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

from stillroom.divergences import Divergence, forward_kl
from stillroom.errors import DataError, ShapeError
from stillroom.measures.reading import label_log_probs, top_of
from stillroom.measures.sums import sums_of
from stillroom.types import UNLABELLED, Batch, Dense, Logits, Projected, Signal, Sparse, positions

BINS = 15  # of the calibration error; Guo et al. 2017


def _labels(batch: Batch, shape: torch.Size, device: torch.device) -> Tensor:
    if batch.labels is None:
        raise DataError(f"example {batch.ids[0]!r} has no label, and this metric needs labels. Give labelled examples.")
    if batch.labels.shape != shape:
        raise ShapeError(f"labels have shape {list(batch.labels.shape)}, but the answers have positions {list(shape)}.")
    return batch.labels.to(device)


def _counted(batch: Batch, logits: Logits) -> Tensor:
    """Positions [...] bool that count: unmasked, and labelled where labels are for these positions."""
    device = _device(logits)
    counted = positions(batch, logits.shape, device)
    if batch.labels is None or batch.labels.is_floating_point() or batch.labels.shape != logits.shape:
        return counted
    return counted & (batch.labels.to(device) != UNLABELLED)


def _device(logits: Logits) -> torch.device:
    tensor = {Dense: "values", Projected: "hidden", Sparse: "ids"}[type(logits)]
    return getattr(logits, tensor).device


def correct(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """1 where the most probable class is the label, else 0; averaged over labelled positions."""
    logits = student.need_logits("accuracy")
    labels = _labels(batch, logits.shape, _device(logits))
    return sums_of(top_of(logits)[0] == labels, _counted(batch, logits))


def surprise(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """-log p(label) in nats, averaged over labelled positions."""
    logits = student.need_logits("nll")
    counted = _counted(batch, logits)
    labels = _labels(batch, logits.shape, _device(logits)).masked_fill(~counted, 0)
    return sums_of(-label_log_probs(logits, labels), counted)


def _one_each(what: str, logits: Logits, batch: Batch, *columns: Tensor) -> Tensor:
    if len(logits.shape) != 1:
        raise ShapeError(f"{what} needs one label per example; these answers have positions {list(logits.shape)}.")
    rows = torch.stack([column.double() for column in columns], -1)
    return rows.masked_fill(~_counted(batch, logits).unsqueeze(-1), float("nan"))


def predicted_and_label(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The mean over classes of the F1 of (predicted, label); a class that is in neither is left out."""
    logits = student.need_logits("macro F1")
    labels = _labels(batch, logits.shape, _device(logits))
    return _one_each("macro F1", logits, batch, top_of(logits)[0], labels)


def macro_f1(statistics: Tensor) -> float:
    """The unweighted mean of 2 tp / (2 tp + fp + fn) over the classes that are predicted or labels."""
    predicted, label = statistics.long().unbind(-1)
    classes = max(2, int(statistics.max()) + 1)
    return float(multiclass_f1_score(predicted, label, num_classes=classes, average="macro", validate_args=False))


def confidence_and_correct(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """|confidence - accuracy| in 15 equal bins of confidence, weighted by their counts (Guo et al. 2017, eq. 3)."""
    logits = student.need_logits("calibration error")
    labels = _labels(batch, logits.shape, _device(logits))
    top, confidence = top_of(logits)
    return _one_each("calibration error", logits, batch, confidence.clamp(max=1.0), top == labels)


def calibration_error(statistics: Tensor) -> float:
    """Sum over bins of (count / N) |accuracy - mean confidence|; Guo et al. 2017, eq. 3."""
    confidence, correct = statistics.unbind(-1)
    return float(
        binary_calibration_error(confidence.contiguous(), correct.long(), n_bins=BINS, norm="l1", validate_args=False)
    )


def agrees(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """1 where the most probable class is the teacher's, else 0."""
    ours, theirs = student.need_logits("agreement"), teacher.need_logits("agreement")
    same = top_of(ours)[0] == top_of(theirs)[0].to(_device(ours))
    return sums_of(same, _counted(batch, ours))


@dataclass(frozen=True)
class Against:
    """A divergence from the teacher, averaged over positions.

    NaN where it cannot be known: a model whose own answers are Sparse, draws and anything but forward KL.
    """

    divergence: Divergence

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Tensor:
        ours, theirs = student.need_logits("a divergence"), teacher.need_logits("a divergence")
        unknown = isinstance(theirs, Sparse) and theirs.sampled and self.divergence is not forward_kl
        if isinstance(ours, Sparse) or unknown:
            return torch.full((len(batch), 2), float("nan"), dtype=torch.float64)
        return sums_of(self.divergence(ours, theirs), _counted(batch, ours))

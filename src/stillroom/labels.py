"""Which rows have a label. Shared by data, by teachers with a fitted head and by classic students."""

from __future__ import annotations

import torch
from torch import Tensor

from stillroom.errors import DataError
from stillroom.types import UNLABELLED, Batch, Examples

ROWS = 512


def labelled_rows(labels: Tensor | None) -> list[int]:
    """The rows of which at least one label is known."""
    if labels is None or len(labels) == 0:
        return []
    known = ~labels.isnan() if labels.is_floating_point() else labels != UNLABELLED
    return known.reshape(len(labels), -1).any(dim=1).nonzero().flatten().tolist()


def labelled_batch(examples: Examples) -> Batch:
    """All rows with a label, unaugmented, as one Batch. Raises DataError when there are none."""
    rows = []
    for start in range(0, len(examples), ROWS):
        batch = examples.batch(range(start, min(start + ROWS, len(examples))), None)
        rows.extend(start + row for row in labelled_rows(batch.labels))
    if not rows:
        raise DataError(f"none of the {len(examples)} examples has a label. Give some labelled rows to fit on.")
    return examples.batch(rows, None)


def class_labels(batch: Batch, classes: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
    """The class numbers int64 [B] and the class names ('0', '1', ... where the data names none).

    Raises DataError for labels that are not one class per example, or a single class.
    """
    labels = batch.labels
    if labels is None or labels.is_floating_point() or labels.dim() != 1:
        shown = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"a classifier is fitted on one class number per example, int64 [B]; the labels are {shown}.")
    names = classes or tuple(str(number) for number in range(int(labels.max()) + 1))
    if len(torch.unique(labels)) < 2:
        raise DataError(
            f"all {len(labels)} labelled examples are of class {names[int(labels[0])]!r}; give two or more."
        )
    return labels, names

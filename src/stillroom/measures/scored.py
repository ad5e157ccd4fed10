"""Models whose answers were scored before they are compared: each example is a row of numbers, not a signal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stillroom.types import Batch, Signal


@dataclass(frozen=True, eq=False)
class Scored:
    """A Model: a batch of examples -> values [B, S], the numbers of each; evaluated like answers."""

    rows: Mapping[str, tuple[float, ...]]  # id -> the numbers
    answers_from_disk = True

    def __call__(self, batch: Batch) -> Signal:
        return Signal(values=torch.tensor([self.rows[name] for name in batch.ids], dtype=torch.float64))

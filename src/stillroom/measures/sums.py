"""Metrics that are one sum over another: a mean, and what is a function of a mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Change = Literal["none", "sqrt", "exp", "bits"]
_CHANGES: dict[Change, Callable[[np.ndarray], np.ndarray]] = {
    "none": np.asarray,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "bits": lambda nats: nats / math.log(2),
}


@dataclass(frozen=True)
class RatioOfSums:
    """change(sum of the first column / sum of the second): a mean over whatever the second column counts.

    ``of_sums`` takes many sums at once [..., 2], which is what makes the bootstrap of such a metric fast.
    """

    change: Change = "none"

    def __call__(self, statistics: Tensor) -> float:
        return float(self.of_sums(statistics.double().sum(0).numpy()))

    def of_sums(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return _CHANGES[self.change](sums[..., 0] / sums[..., 1])


def sums_of(values: Tensor, counted: Tensor) -> Tensor:
    """(sum, count) [B, 2] of the positions of each example; NaN for an example without any."""
    values = values.double().masked_fill(~counted, 0.0).reshape(len(values), -1).sum(-1)
    count = counted.reshape(len(counted), -1).sum(-1).double()
    pair = torch.stack([values, count], -1)
    return pair.masked_fill((count == 0).unsqueeze(-1), float("nan"))


def sums_at(values: Tensor, counted: Tensor) -> Tensor:
    """The same of values [n] at the n counted positions only: (sum, count) [B, 2], NaN for an example without any."""
    count = counted.reshape(len(counted), -1).sum(-1).double()
    total = torch.zeros_like(count).index_add_(0, counted.nonzero()[:, 0], values.double())
    return torch.stack([total, count], -1).masked_fill((count == 0).unsqueeze(-1), float("nan"))

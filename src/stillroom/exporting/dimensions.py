"""Values by dimension: the largest error of each, relative to the range in which the student moves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEARLY_CONSTANT = 0.01  # a dimension that moves less than this share of the widest one is measured by that
SHOWN = 64  # dimensions listed in verify.json; of more, the worst alone is


@dataclass(frozen=True)
class Dimensions:
    """Of D dimensions, over the rows seen so far: the student's least and greatest, and the largest error."""

    low: Tensor  # [D]
    high: Tensor
    largest: Tensor  # |artefact - student|
    worst: tuple[tuple[str, float, float], ...]  # of each dimension: the example, the student's value, the artefact's

    @property
    def relative(self) -> Tensor:
        """|error| / (greatest - least) of each dimension [D]; 0 where nothing differs."""
        span = self.high - self.low
        span = span.clamp(min=float(span.max()) * NEARLY_CONSTANT)
        return torch.where(self.largest == 0, torch.zeros_like(span), self.largest / span)

    def describe(self) -> dict[str, Any]:
        """What verify.json says: {"relative", "dimension", "error", "range", "example"} of the worst, and of all."""
        worst = int(self.relative.argmax())
        ratio = float(self.relative[worst])
        said = {
            "relative": ratio if ratio < float("inf") else None,
            "dimension": worst,
            "error": float(self.largest[worst]),
            "range": [float(self.low[worst]), float(self.high[worst])],
            "example": self.worst[worst][0],
        }
        few = len(self.largest) <= SHOWN
        return said | ({"errors": self.largest.tolist()} if few else {})

    def beyond(self, allowed: float) -> list[str]:
        """A sentence when the worst dimension's error is more than ``allowed`` of its range, with its worst example."""
        worst = int(self.relative.argmax())
        ratio = float(self.relative[worst])
        if ratio <= allowed:
            return []
        name, ours, theirs = self.worst[worst]
        return [
            f"dimension {worst} of its values is off by {float(self.largest[worst]):.3g} at {name} "
            f"(student {ours:.4g}, artefact {theirs:.4g}), {ratio:.0%} of the range {float(self.low[worst]):.3g} to "
            f"{float(self.high[worst]):.3g} in which the student moves it (allowed {allowed:.0%})"
        ]


def by_dimension(ours: Tensor, theirs: Tensor, names: Sequence[str], before: Dimensions | None) -> Dimensions | None:
    """``before`` with rows [N, D] added; ``names``: of the rows. Without rows it stays as it was."""
    if not len(ours):
        return before
    error = (theirs - ours).abs()
    largest, row = error.max(0)
    worst = tuple((str(names[n]), float(ours[n, d]), float(theirs[n, d])) for d, n in enumerate(row.tolist()))
    new = Dimensions(ours.amin(0), ours.amax(0), largest, worst)
    if before is None:
        return new
    greater = new.largest > before.largest
    return Dimensions(
        torch.minimum(new.low, before.low),
        torch.maximum(new.high, before.high),
        torch.maximum(new.largest, before.largest),
        tuple(n if more else b for n, b, more in zip(new.worst, before.worst, greater.tolist(), strict=True)),
    )

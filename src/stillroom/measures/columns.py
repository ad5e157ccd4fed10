"""Agreement with a teacher column by column, where columns differ in kind: probabilities (as log-odds) and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.errors import ShapeError
from stillroom.measures.bootstrap import Interval, bootstrap
from stillroom.measures.sums import RatioOfSums
from stillroom.types import Batch, Metric, Signal

Side = Literal["explained", "same_side", "distance"]


@dataclass(frozen=True)
class Pairs:
    """Statistics: answers and the teacher's [B, 2D'] of the chosen columns; log-odds become probabilities.

    ``probabilities``: how many columns, the first ones, are log-odds. ``first``, ``last``: the columns that are chosen.
    """

    probabilities: int
    first: int = 0
    last: int | None = None

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Tensor:
        sides = [self._read(signal.need_values("agreement by column"), len(batch)) for signal in (student, teacher)]
        if sides[0].shape != sides[1].shape:
            raise ShapeError(f"the model answers {list(sides[0].shape)}, the teacher {list(sides[1].shape)}.")
        return torch.cat(sides, -1)

    def _read(self, values: Tensor, rows: int) -> Tensor:
        values = values.detach().cpu().double().reshape(rows, -1)
        read = torch.cat([values[:, : self.probabilities].sigmoid(), values[:, self.probabilities :]], -1)
        return read[:, self.first : self.last]


@dataclass(frozen=True)
class Explained:
    """1 - sum (answer - teacher)^2 / sum (teacher - its mean)^2, averaged over columns: 1 the same, 0 as good as the
    teacher's mean answer. Columns on which the teacher always says the same do not count; NaN where all are.
    """

    def __call__(self, statistics: Tensor) -> float:
        answers, teacher = statistics.double().chunk(2, dim=-1)
        spread = (teacher - teacher.mean(0)).square().sum(0)
        apart = (answers - teacher).square().sum(0)
        told = spread > 1e-12
        return float((1 - apart[told] / spread[told]).mean()) if bool(told.any()) else math.nan


@dataclass(frozen=True)
class SameSide:
    """(how many are on the teacher's side of one half, how many there are) [B, 2]."""

    pairs: Pairs

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Tensor:
        ours, theirs = self.pairs(student, teacher, batch).chunk(2, dim=-1)
        same = ((ours > 0.5) == (theirs > 0.5)).double().sum(-1)
        return torch.stack([same, torch.full_like(same, ours.shape[-1])], -1)


@dataclass(frozen=True)
class Distance:
    """(sum of |answer - teacher|, how many) [B, 2]."""

    pairs: Pairs

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Tensor:
        ours, theirs = self.pairs(student, teacher, batch).chunk(2, dim=-1)
        return torch.stack([(ours - theirs).abs().sum(-1), torch.full_like(ours[:, 0], ours.shape[-1])], -1)


def explained(name: str, probabilities: int, first: int = 0, last: int | None = None) -> Metric:
    """The share of the teacher's variance that is explained (R2 against the teacher), the mean over the columns."""
    return Metric(name, Pairs(probabilities, first, last), Explained(), against_teacher=True)


def same_side(name: str, probabilities: int, first: int = 0, last: int | None = None) -> Metric:
    """The share of probabilities on the teacher's side of one half."""
    last = probabilities if last is None else last
    return Metric(name, SameSide(Pairs(probabilities, first, last)), RatioOfSums(), against_teacher=True)


def distance(name: str, probabilities: int, first: int = 0, last: int | None = None) -> Metric:
    """The mean of |answer - teacher|, of probabilities or in the number's unit."""
    pairs = Distance(Pairs(probabilities, first, last))
    return Metric(name, pairs, RatioOfSums(), higher_is_better=False, against_teacher=True)


def by_column(
    answers: Tensor, teacher: Tensor, probabilities: int, replicates: int = 1000, seed: int = 0
) -> list[dict[Side, Interval | None]]:
    """Every column's agreement with a 95 % interval over examples: answers [R, N, D] of R seeds, teacher [N, D].

    ``explained`` and ``distance`` of every column, ``same_side`` of those that are probabilities.
    """
    found: list[dict[Side, Interval | None]] = []
    batch = Batch(tuple(map(str, range(len(teacher)))), {})
    for column in range(teacher.shape[-1]):
        kinds: Sequence[tuple[Side, Metric]] = [
            ("explained", explained("explained", probabilities, column, column + 1)),
            ("distance", distance("distance", probabilities, column, column + 1)),
        ]
        if column < probabilities:
            kinds = [*kinds, ("same_side", same_side("same_side", probabilities, column, column + 1))]
        cells: dict[Side, Interval | None] = {}
        for name, metric in kinds:
            rows = [metric.statistics(Signal(values=one), Signal(values=teacher), batch) for one in answers]
            cells[name] = bootstrap(rows, metric.finish, replicates, seed)
        found.append(cells)
    return found

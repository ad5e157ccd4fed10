"""Answers whose columns differ in kind: probabilities and numbers in one network, each matched in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stillroom.errors import ShapeError, UsageError
from stillroom.objectives.matching import where_counted
from stillroom.types import Batch, Signal, positions


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of yes-or-no answers given as log-odds, in nats [...].

    t log(t / s) + (1 - t) log((1 - t) / (1 - s)) with t, s the probabilities: binary cross-entropy with soft targets
    less the teacher's entropy, so it is 0 where both agree, and has the same gradient. Log-odds of +-inf (a teacher
    that is certain, or hard answers) are exact.
    """
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    teacher = teacher.detach().to(student.dtype)

    def part(sign: int) -> Tensor:
        share = torch.sigmoid(sign * teacher)
        # where the share is 0 so is the term; 0 * inf would be NaN
        log_ratio = logsigmoid(sign * teacher).masked_fill(share == 0, 0) - logsigmoid(sign * student)
        return share * log_ratio.masked_fill(share == 0, 0)

    return (part(1) + part(-1)).clamp(min=0)


@dataclass(frozen=True)
class MatchColumns:
    """Values [..., D] of two kinds: the first ``probabilities`` columns are log-odds, the others numbers.

    Terms, each averaged over its columns: ``probabilities``, KL(teacher || student) in nats (``bernoulli_kl``), and
    ``numbers``, the squared difference over ``scales`` squared, times ``weight``. ``scales``: one for each number, in
    its unit, such as the standard deviation of the teacher's answers: so that degrees and milligrams weigh alike.
    Raises UsageError for scales that are not above 0, ShapeError for answers with another number of columns.
    """

    probabilities: int
    scales: tuple[float, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if self.probabilities < 0 or self.probabilities + len(self.scales) == 0:
            raise UsageError(f"probabilities={self.probabilities} and {len(self.scales)} scales name no columns.")
        if any(not 0 < scale < float("inf") for scale in self.scales):
            raise UsageError(f"scales are finite and above 0, not {self.scales}.")
        if not 0 <= self.weight < float("inf"):
            raise UsageError(f"weight={self.weight} must be finite and not negative.")

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        ours, theirs = student.need_values("MatchColumns"), teacher.need_values("MatchColumns").detach()
        columns = self.probabilities + len(self.scales)
        if ours.shape != theirs.shape or ours.shape[-1] != columns:
            raise ShapeError(
                f"MatchColumns is of {columns} columns; the student gives {list(ours.shape)}, the teacher "
                f"{list(theirs.shape)}."
            )
        theirs = theirs.to(ours.device)
        counted = positions(batch, ours.shape[:-1], ours.device)
        cut, terms = self.probabilities, {}
        if cut:
            terms["probabilities"] = where_counted(
                counted, lambda where: bernoulli_kl(ours[where][..., :cut], theirs[where][..., :cut]).mean(-1)
            )
        if self.scales:
            scales = torch.tensor(self.scales, device=ours.device)

            def apart(where: Tensor | slice) -> Tensor:
                return ((ours[where][..., cut:] - theirs[where][..., cut:]).float() / scales).square().mean(-1)

            terms["numbers"] = self.weight * where_counted(counted, apart)
        return terms

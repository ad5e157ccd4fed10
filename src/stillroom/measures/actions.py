"""How far actions [..., D] are from a teacher's, dimension by dimension: the mean, and the largest that ever occurred.

A mean hides what a robot feels: a policy may differ by 0.3 of a range of 2 in one of a thousand states and by nothing
in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.actions import actions_of, checked_limits, limits_as
from stillroom.errors import ShapeError, UsageError
from stillroom.measures.regression import largest
from stillroom.measures.sums import RatioOfSums, sums_of
from stillroom.types import Batch, Metric, Signal, positions


@dataclass(frozen=True)
class ActionError:
    """|student - teacher| of executed actions: of one ``dimension``, or of all; its mean, or its largest value.

    ``clip`` = (low, high): what the environment limits actions to, on both sides. ``actions``: so many of the values
    are actions (the means of a Gaussian [..., 2D]); default: all. Statistics of an example over the positions that
    count: (sum, count) [B, 2], or the largest [B, 1]; NaN where none counts.
    """

    dimension: int | None = None
    worst: bool = False
    clip: Any = None
    actions: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", checked_limits(self.clip))

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Tensor:
        sides = []
        for signal, whose in ((student, "the student"), (teacher, "the teacher")):
            side = actions_of(signal.need_values("action error"), self.actions, whose).double()
            sides.append(side if self.clip is None else side.clamp(*limits_as(side, self.clip)))
        ours, theirs = sides[0], sides[1].to(sides[0].device)
        if ours.shape != theirs.shape:
            raise ShapeError(
                f"the student's actions have shape {list(ours.shape)}, the teacher's {list(theirs.shape)}."
            )
        error = (ours - theirs).abs()
        if self.dimension is not None:
            if not 0 <= self.dimension < error.shape[-1]:
                raise UsageError(f"there is no action {self.dimension}: actions are 0 to {error.shape[-1] - 1}.")
            error = error[..., self.dimension : self.dimension + 1]
        counted = positions(batch, error.shape[:-1], error.device).unsqueeze(-1).expand_as(error)
        if not self.worst:
            return sums_of(error, counted)
        most = error.masked_fill(~counted, -torch.inf).reshape(len(batch), -1).amax(-1, keepdim=True)
        return most.masked_fill(most == -torch.inf, torch.nan)


def action_metrics(names: Sequence[str], clip: Any = None, gaussian: bool = False) -> tuple[Metric, ...]:
    """The mean and the largest error of each named action, and of all, in the unit of the actions.

    Named 'action_error', 'largest_action_error', 'action_error.NAME', 'largest_action_error.NAME'.
    ``names`` in the order of the actions; ``clip``: the environment's limits; ``gaussian``: values are means and
    log-deviations [..., 2D], of which the means are the actions.
    """
    if not names:
        raise UsageError("action_metrics needs the names of the actions, in their order.")
    actions = len(names) if gaussian else None
    ends: list[tuple[str, int | None]] = [("", None), *((f".{name}", index) for index, name in enumerate(names))]
    found = []
    for end, dimension in ends:
        mean = ActionError(dimension, False, clip, actions)
        most = ActionError(dimension, True, clip, actions)
        found.append(Metric(f"action_error{end}", mean, RatioOfSums(), higher_is_better=False, against_teacher=True))
        found.append(Metric(f"largest_action_error{end}", most, largest, higher_is_better=False, against_teacher=True))
    return tuple(found)

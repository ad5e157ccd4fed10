"""What a policy is asked to match: actions, dimension by dimension, and Gaussians over them.

A Gaussian travels in ``values`` [..., 2D]: D means, then D natural logarithms of standard deviations (decision 0022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.actions import actions_of, as_dimensions, checked_limits, gaussian_kl, limits_as, nearest_like
from stillroom.errors import ShapeError, UsageError
from stillroom.objectives.matching import where_counted
from stillroom.types import Batch, Signal, positions


@dataclass(frozen=True)
class MatchActions:
    """The student's action matches the teacher's: sum_d w_d l(s_d - t_d) / sum_d w_d, per position [...].

    ``loss``: 'mse' is l(e) = e^2, 'huber' is e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2) (Huber 1964).
    ``weights``: one number for each of D dimensions, in the order of the actions; only their ratios matter; 0 leaves a
    dimension out. ``clip`` = (low, high), numbers or one for each dimension: what the environment limits actions to.
    Then t is clipped, and where it lies on a limit s may lie beyond it: e is the distance from s to the actions that
    are executed like the teacher's, so a student on the wrong side of both limits still has a gradient.
    ``actions``: so many of the values are actions (the D means of a Gaussian [..., 2D]); default: all.
    Term: ``match_actions``. Raises UsageError for settings out of range, ShapeError where sizes differ.
    """

    loss: Literal["mse", "huber"] = "mse"
    delta: float = 1.0
    weights: Any = None  # Sequence[float], kept as a tuple
    clip: Any = None  # (low, high), each a float or Sequence[float], kept as tuples
    actions: int | None = None

    def __post_init__(self) -> None:
        if self.loss not in ("mse", "huber"):
            raise UsageError(f"loss={self.loss!r} is not known: choose 'mse' or 'huber'.")
        if not 0 < self.delta < math.inf:
            raise UsageError(f"delta={self.delta} cannot be used: choose a number above 0.")
        if self.actions is not None and self.actions < 1:
            raise UsageError(f"actions={self.actions}: at least one of the values is an action. Leave it out for all.")
        object.__setattr__(self, "weights", _checked_weights(self.weights))
        object.__setattr__(self, "clip", checked_limits(self.clip))

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        ours = actions_of(student.need_values("MatchActions"), self.actions, "the student")
        theirs = actions_of(teacher.need_values("MatchActions").detach(), self.actions, "the teacher")
        if ours.shape != theirs.shape:
            raise ShapeError(
                f"the student's actions have shape {list(ours.shape)}, the teacher's {list(theirs.shape)}. "
                "Where one of them gives means and log-deviations, actions=D takes the means."
            )
        counted = positions(batch, ours.shape[:-1], ours.device)
        return {"match_actions": where_counted(counted, lambda where: self._compare(ours[where], theirs[where]))}

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student.to(wide), teacher.to(device=student.device, dtype=wide)
        target = teacher if self.clip is None else nearest_like(student, teacher, *limits_as(teacher, self.clip))
        if self.loss == "huber":
            losses = torch.nn.functional.huber_loss(student, target, reduction="none", delta=self.delta)
        else:
            losses = (student - target).square()
        if self.weights is None:
            return losses.mean(-1)
        if len(self.weights) != losses.shape[-1]:
            raise ShapeError(f"weights has {len(self.weights)} numbers, but there are {losses.shape[-1]} actions.")
        weights = as_dimensions(losses, self.weights, "weights")
        return (losses * (weights / weights.sum())).sum(-1)


@dataclass(frozen=True)
class MatchGaussians:
    """The student's distribution over actions matches the teacher's: KL of diagonal Gaussians, in nats [...].

    forward, KL(teacher || student) = sum_d log(s_d / t_d) + (t_d^2 + (m_d - n_d)^2) / (2 s_d^2) - 1/2, with the
    teacher's means m and deviations t, the student's n and s; reverse is KL(student || teacher), the two exchanged.
    ``values`` [..., 2D] on both sides: D means, then D natural logs of deviations. Logs are taken as if within
    [-20, 20]; beyond, the gradient is the one at the limit, so a student that ran away comes back. Not averaged over D.
    Term: ``match_gaussians``. Raises ShapeError for an odd size or sizes that differ.
    """

    direction: Literal["forward", "reverse"] = "forward"

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise UsageError(f"direction={self.direction!r} is not known: choose 'forward' or 'reverse'.")

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        ours, theirs = student.need_values("MatchGaussians"), teacher.need_values("MatchGaussians").detach()
        if ours.shape != theirs.shape or ours.shape[-1] % 2:
            raise ShapeError(
                f"the student's values have shape {list(ours.shape)}, the teacher's {list(theirs.shape)}; Gaussians "
                "are [..., 2D] on both sides: D means, then D log-deviations. For means alone: MatchActions(actions=D)."
            )
        counted = positions(batch, ours.shape[:-1], ours.device)
        return {"match_gaussians": where_counted(counted, lambda where: self._compare(ours[where], theirs[where]))}

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student.to(wide), teacher.to(device=student.device, dtype=wide)
        return gaussian_kl(*((teacher, student) if self.direction == "forward" else (student, teacher)))


def _checked_weights(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    if weights is None:
        return None
    found = tuple(float(weight) for weight in weights)
    if not found or not all(0 <= weight < math.inf for weight in found) or sum(found) == 0:
        raise UsageError(f"weights={list(found)}: one number for each action, finite, not negative, not all 0.")
    return found

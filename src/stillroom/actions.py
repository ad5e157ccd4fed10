"""Numbers that act: their limits, and Gaussians over them as ``values`` [..., 2D]: D means, then D log-deviations.

Knows no mask and no average over positions; float32 at least, which the caller sees to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ShapeError, UsageError

LOG_STD = (-20.0, 20.0)  # e^80, the largest ratio of variances, is finite in float32 with its gradient
Limits = tuple[tuple[float, ...], tuple[float, ...]]


def gaussian_kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) in nats of diagonal Gaussians [..., 2D] (means, then logs of deviations); [..., 2D] -> [...].

    With u = log(first deviation / second): sum_d (e^(2u) - 1) / 2 - u + (difference of means / second deviation)^2 / 2,
    which is the usual formula, and keeps its digits where the two are almost equal.
    """
    (mean, log_std), (other_mean, other_log_std) = (each.chunk(2, dim=-1) for each in (first, second))
    log_std, other_log_std = _limited(log_std), _limited(other_log_std)
    ratio = log_std - other_log_std
    distance = (mean - other_mean) * torch.exp(-other_log_std)
    return (torch.expm1(2 * ratio) / 2 - ratio + distance.square() / 2).sum(-1)


def _limited(log_std: Tensor) -> Tensor:
    """The value within LOG_STD, the gradient as if it lay there."""
    return log_std + (log_std.clamp(*LOG_STD) - log_std).detach()


def actions_of(values: Tensor, actions: int | None, whose: str = "the model") -> Tensor:
    """The first ``actions`` of the values [..., D]; all of them for None."""
    if actions is None:
        return values
    if values.shape[-1] < actions:
        raise ShapeError(f"{whose} gives {values.shape[-1]} values, but actions={actions}.")
    return values[..., :actions]


def nearest_like(student: Tensor, teacher: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Of the actions that limits execute like the teacher's, the one nearest to the student's; [..., D].

    The teacher's own where it lies between the limits; where it is on one or beyond, whatever lies there is the same.
    """
    above = torch.maximum(student.detach(), high)
    below = torch.minimum(student.detach(), low)
    return torch.where(teacher >= high, above, torch.where(teacher <= low, below, teacher))


def checked_limits(clip: Any) -> Limits | None:
    """(low, high) as two tuples of one size, low below high. Raises UsageError, with what was given."""
    if clip is None:
        return None
    if not isinstance(clip, list | tuple) or len(clip) != 2:
        raise UsageError(f"clip={clip!r}: give (low, high), numbers or one for each action.")
    low, high = (tuple(map(float, end)) if isinstance(end, list | tuple) else (float(end),) for end in clip)
    if len(low) != len(high) and 1 not in (len(low), len(high)):
        raise UsageError(f"clip has {len(low)} low limits and {len(high)} high ones.")
    size = max(len(low), len(high))
    low, high = low * (size // len(low)), high * (size // len(high))
    if not all(lower < upper for lower, upper in zip(low, high, strict=True)):
        raise UsageError(f"clip={clip!r}: each low limit must lie below its high one.")
    return low, high


def limits_as(actions: Tensor, clip: Limits) -> tuple[Tensor, Tensor]:
    """The limits as tensors that fit actions [..., D]."""
    low, high = (as_dimensions(actions, end, "clip") for end in clip)
    return low, high


def as_dimensions(like: Tensor, numbers: Sequence[float], what: str) -> Tensor:
    """One number, or one for each of D, as a tensor that fits [..., D]. Raises ShapeError with both sizes."""
    if len(numbers) not in (1, like.shape[-1]):
        raise ShapeError(f"{what} has {len(numbers)} numbers, but there are {like.shape[-1]} actions.")
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)

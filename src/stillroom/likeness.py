"""How far a student's continuous values are from a teacher's: one number per position or example, 0 where they agree.

Position by position: mean_squared, normalised_mean_squared, huber, cosine; [..., D] -> [...], D averaged.
Example by example: attention_transfer; maps [B, C, H, W] -> [B].
Between the examples of a batch: relational_distance, relational_angle, similarity_preserving; [B, ...] -> [B].
Knows no mask and no average over positions. float32 at least; no gradient goes to the teacher.
All raise ShapeError, with both shapes, where the two do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillroom.errors import ShapeError, UsageError


def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over D of (s - t)^2; [..., D] -> [...]."""
    student, teacher = _pair(student, teacher)
    return (student - teacher).square().mean(-1)


def normalised_mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over D of (s / |s| - t / |t|)^2 = 2 (1 - cos) / D; [..., D] -> [...]. Blind to scales."""
    student, teacher = _pair(student, teacher)
    return (_unit(student) - _unit(teacher)).square().mean(-1)


def huber(student: Tensor, teacher: Tensor, *, delta: float = 1.0) -> Tensor:
    """The mean over D of d^2 / 2 where d = |s - t| <= delta, else delta (d - delta / 2); [..., D] -> [...]. Huber 1964.

    Raises UsageError unless delta > 0.
    """
    if not delta > 0:
        raise UsageError(f"delta={delta} cannot be used: choose a number above 0.")
    student, teacher = _pair(student, teacher)
    return torch.nn.functional.huber_loss(student, teacher, reduction="none", delta=delta).mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t), from 0 to 2; [..., D] -> [...].

    Computed as |s / |s| - t / |t||^2 / 2, which keeps its digits near 0.
    """
    student, teacher = _pair(student, teacher)
    return (_unit(student) - _unit(teacher)).square().sum(-1) / 2


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over H x W of (a / |a| - b / |b|)^2, a = the mean over C of s^2, b of t^2; [B, C, H, W] -> [B].

    Zagoruyko & Komodakis 2017 (AT), with p = 2 and the squared norm of the authors' code. C may differ.
    """
    fits = student.dim() == teacher.dim() == 4 and student.shape[0] == teacher.shape[0]
    if not fits or student.shape[2:] != teacher.shape[2:]:
        raise _do_not_fit(student, teacher, "attention maps are [B, C, H, W] with the same B, H and W")
    ours, theirs = (_unit(each.square().mean(1).flatten(1)) for each in _wide(student, teacher))
    return (ours - theirs).square().mean(-1)


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over j of huber(|s_i - s_j| / mean distance, the same of t), delta 1; [B, ...] -> [B].

    Park et al. 2019 (RKD), eq. 6 to 8: the mean is over distances above 0, and j = i (always 0) counts, as in the
    authors' code. Its value depends on which examples share a batch.
    """
    ours, theirs = (_relative_distances(each) for each in _examples(student, teacher))
    return torch.nn.functional.huber_loss(ours, theirs, reduction="none").mean(-1)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over j, k of huber(cos of the angle j-i-k in s, the same in t), delta 1; [B, ...] -> [B].

    Park et al. 2019 (RKD), eq. 9 and 10. Its value depends on which examples share a batch; B^3 numbers are held.
    """
    ours, theirs = (_angles(each) for each in _examples(student, teacher))
    return torch.nn.functional.huber_loss(ours, theirs, reduction="none").mean((-1, -2))


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over j of (g_ij - h_ij)^2, g = S S.T with rows of norm 1, h of T; [B, ...] -> [B].

    Tung & Mori 2019 (SP), eq. 2 to 4. Its value depends on which examples share a batch.
    """
    ours, theirs = (_unit(each @ each.t()) for each in _examples(student, teacher))
    return (ours - theirs).square().mean(-1)


def _relative_distances(points: Tensor) -> Tensor:
    """|x_i - x_j| / the mean of those above 0; [B, D] -> [B, B]."""
    distances = _norm(points.unsqueeze(1) - points.unsqueeze(0)).squeeze(-1)
    apart = (distances > 0).sum().clamp_min(1)
    mean = distances.sum() / apart
    return distances / torch.where(mean > 0, mean, 1.0)


def _angles(points: Tensor) -> Tensor:
    """The cosine of the angle at i between j and k; [B, D] -> [B, B, B]."""
    sides = _unit(points.unsqueeze(0) - points.unsqueeze(1))
    return torch.bmm(sides, sides.transpose(1, 2))


def _norm(values: Tensor) -> Tensor:
    """The length over the last dimension, kept; its gradient at 0 is 0 (that of sqrt is infinite)."""
    square = values.square().sum(-1, keepdim=True)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def _unit(values: Tensor) -> Tensor:
    """Length 1 over the last dimension; 0 stays 0."""
    largest = values.detach().abs().amax(-1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1.0)  # so that no square over- or underflows
    norm = _norm(values)
    return values / torch.where(norm > 0, norm, 1.0)


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    return student.to(wide), teacher.detach().to(wide)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.dim() == 0:
        raise _do_not_fit(student, teacher, "values compared one by one are [..., D] on both sides")
    return _wide(student, teacher)


def _examples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """[B, everything else] on both sides; only B must agree."""
    if student.dim() < 2 or teacher.dim() < 2 or len(student) != len(teacher):
        raise _do_not_fit(student, teacher, "relations need [B, ...] with the same B")
    student, teacher = _wide(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def _do_not_fit(student: Tensor, teacher: Tensor, want: str) -> ShapeError:
    return ShapeError(f"the student has shape {list(student.shape)}, the teacher {list(teacher.shape)}: {want}.")

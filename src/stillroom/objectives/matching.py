"""What a student is asked to match: each objective binds the mathematics to a signal and returns unreduced numbers.

An objective never averages. ``masked_mean`` and its parts are the one place where positions become one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from stillroom.divergences import cross_entropy, forward_kl
from stillroom.divergences.projection import EXACT, Arithmetic
from stillroom.errors import DataError, ShapeError, UsageError
from stillroom.likeness import mean_squared
from stillroom.types import UNLABELLED, Average, Batch, Signal, as_logits, positions

Divergence = Callable[..., Tensor]
Likeness = Callable[[Tensor, Tensor], Tensor]


def position_weights(counted: Tensor, average: Average = "position") -> Tensor:
    """Weights [...] of the positions that count: 1 each, or 1 / (those of its example) for ``average='example'``."""
    weights = counted.float()
    if average == "example" and counted.dim() > 1:
        weights = weights / weights.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (counted.dim() - 1))
    return weights


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """The sum of weights * values [...], float32 at least; what has weight 0 is removed: NaN there reaches nothing.

    Values with further dimensions than the weights are averaged over those first. Raises ShapeError, with both shapes.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.dim() > weights.dim() and values.shape[: weights.dim()] == weights.shape:
        values = values.flatten(weights.dim()).mean(-1)
    if values.shape != weights.shape:
        raise ShapeError(f"an objective returned {list(values.shape)}, but the positions are {list(weights.shape)}.")
    return (values.masked_fill(weights == 0, 0) * weights.to(values.dtype)).sum()


def masked_mean(values: Tensor, mask: Tensor | None = None, average: Average = "position") -> Tensor:
    """The mean of ``values`` [...] over the positions where ``mask`` [...] is True; 0, with a gradient, where none is.

    Masked means removed: sum(values[mask]) / count, float32 at least. ``average='example'`` averages each example's
    positions first, then the examples that have one. Raises ShapeError where the mask does not fit.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool().to(values.device)
    weights = position_weights(mask, average)
    return weighted_sum(values, weights) / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def counted_positions(batch: Batch) -> Tensor:
    """The positions [...] bool of a batch that count: its mask, else one for each label, else one for each example."""
    if batch.mask is not None:
        return batch.mask.bool()
    if batch.labels is not None:
        shape = batch.labels.shape[:-1] if batch.labels.is_floating_point() else batch.labels.shape
        return torch.ones(shape, dtype=torch.bool)
    return torch.ones(len(batch), dtype=torch.bool)


def where_counted(counted: Tensor, compute: Callable[[Tensor | slice], Tensor]) -> Tensor:
    """``compute`` on the counted positions only, 0 elsewhere.

    A NaN at an uncounted position, multiplied by a gradient of 0, would be NaN in the gradient of everything before it.
    """
    if bool(counted.all()):
        return compute(slice(None))
    found = compute(counted)
    return torch.zeros(counted.shape, dtype=found.dtype, device=found.device).masked_scatter(counted, found)


@dataclass(frozen=True)
class SoftTargets:
    """The student's distribution matches the teacher's: T^2 * divergence(student, teacher at temperature T), in nats.

    Hinton et al. 2015, section 2: the factor T^2 keeps the gradient's size independent of T; it can be switched off.
    ``divergence`` is any of stillroom.divergences, or one bound with its settings. Term: ``soft_targets`` [...].
    ``matmul`` and ``keep_columns`` make a Projected student's step cheaper than exact: see projection.Arithmetic.
    Raises UsageError for settings out of range, and for these two with a Dense student.
    """

    divergence: Divergence = forward_kl
    temperature: float = 2.0
    scale_by_temperature_squared: bool = True
    extra_ids: Literal["zero", "ignore"] = "zero"
    matmul: Literal["auto", "bf16"] = "auto"
    keep_columns: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature must be above 0, not {self.temperature}.")
        Arithmetic(self.matmul, self.keep_columns)  # refuses what it cannot use

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        ours = as_logits(student.need_logits("SoftTargets"))
        theirs = as_logits(teacher.need_logits("SoftTargets"))
        if ours.shape != theirs.shape:
            raise ShapeError(
                f"the student answers at positions {list(ours.shape)}, the teacher at {list(theirs.shape)}."
            )
        settings: dict[str, Any] = {"temperature": self.temperature, "extra_ids": self.extra_ids}
        arithmetic = Arithmetic(self.matmul, self.keep_columns)
        if arithmetic != EXACT:  # a divergence of the user's own need not know it
            settings["arithmetic"] = arithmetic

        def compute(where: Tensor | slice) -> Tensor:
            return self.divergence(ours[where], theirs[where], **settings)

        counted = positions(batch, ours.shape, _device(student))
        values = where_counted(counted, compute)
        return {"soft_targets": values * self.temperature**2 if self.scale_by_temperature_squared else values}


@dataclass(frozen=True)
class HardLabels:
    """The student matches the labels: cross-entropy in nats [...], or for float labels the squared error, mean over D.

    Unlabelled positions (-100, or NaN in any of D) are 0 and do not count. Term: ``hard_labels``.
    Raises DataError when there are no labels, or a label lies outside the student's classes (which example), and
    ShapeError when labels and mask differ.
    """

    needs_labels: ClassVar[bool] = True

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        if batch.labels is None:
            raise DataError("HardLabels needs labels, and the examples have none. Choose SoftTargets, or add labels.")
        counted = self._labelled(batch)
        if batch.labels.is_floating_point():
            ours = student.need_values("HardLabels on float labels")
            labels, counted = batch.labels.to(ours.device), counted.to(ours.device)
            return {"hard_labels": where_counted(counted, lambda where: mean_squared(ours[where], labels[where]))}
        logits = as_logits(student.need_logits("HardLabels"))
        _check_labels(batch, logits.vocabulary)
        device = _device(student)
        labels, counted = batch.labels.to(device), counted.to(device)
        return {"hard_labels": where_counted(counted, lambda where: cross_entropy(logits[where], labels[where]))}

    def counted(self, batch: Batch) -> Mapping[str, Tensor]:
        """The labelled positions [...] among those that count."""
        return {"hard_labels": self._labelled(batch)}

    @staticmethod
    def _labelled(batch: Batch) -> Tensor:
        counted = counted_positions(batch)
        if batch.labels is None:
            return torch.zeros_like(counted)
        floats = batch.labels.is_floating_point()
        labelled = ~batch.labels.isnan().any(-1) if floats else batch.labels != UNLABELLED
        if labelled.shape != counted.shape:
            raise ShapeError(f"the labels have positions {list(labelled.shape)}, but the mask {list(counted.shape)}.")
        return counted & labelled


def _check_labels(batch: Batch, classes: int) -> None:
    labels = cast(Tensor, batch.labels)
    wrong = (labels != UNLABELLED) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        row = int(wrong.reshape(len(batch), -1).any(1).nonzero()[0])
        value = int(labels[wrong][0])
        raise DataError(
            f"example {batch.ids[row]!r} has label {value}, but the student has {classes} classes "
            f"(0 to {classes - 1}, {UNLABELLED} = unlabelled). Check the labels or the student's output size."
        )


@dataclass(frozen=True)
class MatchValues:
    """The student's continuous answer matches the teacher's: ``likeness(student, teacher)`` [...], mean over D.

    Term: ``match_values``. likeness: stillroom.likeness.mean_squared, huber, cosine, ...
    """

    likeness: Likeness = mean_squared

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        ours, theirs = student.need_values("MatchValues"), teacher.need_values("MatchValues").detach()
        if ours.shape != theirs.shape:
            raise ShapeError(f"the student's values have shape {list(ours.shape)}, the teacher's {list(theirs.shape)}.")
        counted = positions(batch, ours.shape[:-1], ours.device)
        return {"match_values": where_counted(counted, lambda where: self.likeness(ours[where], theirs[where]))}


@dataclass(frozen=True)
class Mix:
    """A weighted sum of objectives: Mix({SoftTargets(): 0.9, HardLabels(): 0.1}). Terms keep their names.

    A name that occurs twice gets '#2'. Weights must be finite and not negative; each term is averaged over the
    positions that it counts, so a weight means the same whatever share of the examples is labelled.
    """

    parts: Any  # Mapping[Objective, float] or pairs, kept as a tuple of (objective, weight)

    def __post_init__(self) -> None:
        given = self.parts
        pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple((p[0], p[1]) for p in given)
        if not pairs:
            raise UsageError("Mix needs at least one objective.")
        for objective, weight in pairs:
            if not 0 <= weight < float("inf"):
                raise UsageError(f"the weight of {objective} is {weight}; weights are finite and not negative.")
        object.__setattr__(self, "parts", pairs)

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        terms = self._gather(lambda objective: objective(student, teacher, batch))
        return {name: weight * values for name, (weight, values) in terms.items()}

    def _gather(self, ask: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, tuple[float, Tensor]]:
        found: dict[str, tuple[float, Tensor]] = {}
        for objective, weight in self.parts:
            for name, values in ask(objective).items():
                unique, times = name, 1
                while unique in found:
                    times += 1
                    unique = f"{name}#{times}"
                found[unique] = (weight, values)
        return found

    def counted(self, batch: Batch) -> Mapping[str, Tensor]:
        """The positions that each part's terms count, under the names that ``__call__`` gives them."""
        found = self._gather(lambda objective: objective.counted(batch) if hasattr(objective, "counted") else {})
        return {name: mask for name, (_, mask) in found.items()}

    @property
    def couples_examples(self) -> bool:
        return any(getattr(objective, "couples_examples", False) for objective, _ in self.parts)

    @property
    def needs_labels(self) -> bool:
        return any(getattr(objective, "needs_labels", False) for objective, _ in self.parts)

    @property
    def student_features(self) -> tuple[str, ...]:
        return tuple(path for objective, _ in self.parts for path in getattr(objective, "student_features", ()))

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return tuple(path for objective, _ in self.parts for path in getattr(objective, "teacher_features", ()))


def learns(objective: Any) -> bool:
    """Whether an objective, or a part of it, has parameters of its own to be built."""
    return hasattr(objective, "build") or (
        isinstance(objective, Mix) and any(learns(part) for part, _ in objective.parts)
    )


def built(objective: Any, student: Signal, teacher: Signal) -> tuple[Any, list[nn.Module]]:
    """The objective with everything that learns in it built for these signals' shapes, and those modules.

    An objective that learns has ``build(student, teacher) -> nn.Module``; the module is the objective from then on.
    """
    if isinstance(objective, Mix):
        parts = [(*built(part, student, teacher), weight) for part, weight in objective.parts]
        return Mix(tuple((part, weight) for part, _, weight in parts)), [m for _, found, _ in parts for m in found]
    if hasattr(objective, "build"):
        module = objective.build(student, teacher)
        return module, [module]
    return objective, []


def _device(signal: Signal) -> torch.device:
    logits = signal.logits
    for name in ("values", "hidden", "log_probs"):
        if isinstance(found := getattr(logits, name, None), Tensor):
            return found.device
    return torch.device("cpu")

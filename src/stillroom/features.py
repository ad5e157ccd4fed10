"""Objectives on what happens inside a network: features caught at module paths, and relations between examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from stillroom.errors import ShapeError, SignalError, UsageError
from stillroom.likeness import mean_squared, relational_distance
from stillroom.types import Batch, Signal

Likeness = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MatchFeatures:
    """Features of the student match the teacher's: likeness(projector(student), teacher), averaged over each position.

    ``pairs``: {student module path: teacher module path}, caught by forward hooks, several per network. FitNets, Romero
    et al. 2015, eq. 1. Where widths differ, ``projector='auto'`` learns a linear map ([..., D]) or a 1x1 convolution
    ([B, C, H, W]) from the student's width to the teacher's, trained with the student and never exported;
    ``projector='none'`` refuses. Maps [B, C, H, W] become one number per example; [B, T, D] one per position.
    Terms: ``features.<student path>``. Raises ShapeError with both shapes when the rest of the shapes do not fit.
    """

    pairs: Any  # Mapping[str, str], kept as a tuple of (student path, teacher path)
    likeness: Likeness = mean_squared
    projector: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        given = self.pairs
        pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple((str(p[0]), str(p[1])) for p in given)
        if not pairs:
            raise UsageError("MatchFeatures needs at least one pair {student path: teacher path}.")
        object.__setattr__(self, "pairs", pairs)

    @property
    def student_features(self) -> tuple[str, ...]:
        return tuple(ours for ours, _ in self.pairs)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return tuple(theirs for _, theirs in self.pairs)

    def build(self, student: Signal, teacher: Signal) -> nn.Module:
        """The objective with its projectors, made for the widths of these two signals."""
        return ProjectedFeatures(self, student, teacher)

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        """Without projectors: the widths must agree."""
        return _compare(self, {}, student, teacher, batch)


class ProjectedFeatures(nn.Module):
    """A MatchFeatures with its learned projectors. Same call, same terms."""

    def __init__(self, objective: MatchFeatures, student: Signal, teacher: Signal) -> None:
        super().__init__()
        self.objective = objective
        self.student_features, self.teacher_features = objective.student_features, objective.teacher_features
        self.projectors = nn.ModuleDict()
        for ours, theirs in objective.pairs:
            mine, wanted = feature(student, ours, "student"), feature(teacher, theirs, "teacher")
            if mine.dim() != wanted.dim():
                raise _do_not_fit(ours, mine, theirs, wanted)
            axis = 1 if mine.dim() == 4 else -1
            have, want = mine.shape[axis], wanted.shape[axis]
            if have != want and objective.projector == "auto":
                made = nn.Conv2d(have, want, 1) if mine.dim() == 4 else nn.Linear(have, want)
                self.projectors[_key(ours)] = made.to(mine.device)

    def forward(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        return _compare(self.objective, self.projectors, student, teacher, batch)


def _compare(
    objective: MatchFeatures, projectors: Any, student: Signal, teacher: Signal, batch: Batch
) -> Mapping[str, Tensor]:
    found = {}
    for ours, theirs in objective.pairs:
        mine, wanted = feature(student, ours, "student"), feature(teacher, theirs, "teacher").detach()
        if _key(ours) in projectors:
            mine = projectors[_key(ours)](mine)
        if mine.shape != wanted.shape:
            raise _do_not_fit(ours, mine, theirs, wanted)
        if mine.dim() == 4:  # [B, C, H, W]: the channels are the features, the places are averaged
            mine, wanted = mine.movedim(1, -1), wanted.movedim(1, -1)
        values = objective.likeness(mine, wanted)
        per_position = batch.mask.dim() if batch.mask is not None else 1
        found[f"features.{ours}"] = values.flatten(per_position).mean(-1) if values.dim() > per_position else values
    return found


def feature(signal: Signal, path: str, whose: str) -> Tensor:
    """The feature at ``path``, or a SignalError that says what is there and how to get it."""
    if path not in signal.features:
        raise SignalError(
            f"an objective needs the {whose}'s features[{path!r}], but it gives {list(signal.given)}. "
            f"Give the model features=({path!r},), or record again with keep=Features(({path!r},))."
        )
    return signal.features[path]


def _do_not_fit(ours: str, mine: Tensor, theirs: str, wanted: Tensor) -> ShapeError:
    return ShapeError(
        f"the student's {ours!r} gives {list(mine.shape)} and the teacher's {theirs!r} gives {list(wanted.shape)}; "
        "only the feature width can be projected. Pair modules whose other sizes agree."
    )


def _key(path: str) -> str:
    return path.replace(".", "/")  # nn.ModuleDict refuses dots


@dataclass(frozen=True)
class MatchRelations:
    """The relations between the examples of a batch match: RKD (Park et al. 2019), on values or one feature each.

    Its value depends on which examples share a batch: refused under accumulation and on several ranks.
    Term: ``match_relations`` [B].
    """

    relation: Likeness = relational_distance
    student_path: str | None = None
    teacher_path: str | None = None

    @property
    def couples_examples(self) -> bool:
        return True

    @property
    def student_features(self) -> tuple[str, ...]:
        return (self.student_path,) if self.student_path else ()

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return (self.teacher_path,) if self.teacher_path else ()

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        ours = feature(student, self.student_path, "student") if self.student_path else student.need_values()
        theirs = feature(teacher, self.teacher_path, "teacher") if self.teacher_path else teacher.need_values()
        return {"match_relations": self.relation(ours.flatten(1), theirs.detach().flatten(1))}

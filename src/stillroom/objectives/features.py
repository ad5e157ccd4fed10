"""Objectives on what happens inside a network: features caught at module paths, and relations between examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from stillroom.errors import ShapeError, SignalError, UsageError
from stillroom.likeness import attention_transfer, mean_squared, relational_distance
from stillroom.objectives.matching import counted_positions, where_counted
from stillroom.types import Batch, Signal

Likeness = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MatchFeatures:
    """Features of the student match the teacher's: likeness(projector(student), teacher), averaged over each position.

    ``pairs``: {student module path: teacher module path}, caught by forward hooks, several per network; 'path#2' is
    the second call of a module. FitNets, Romero et al. 2015, eq. 1. Where widths differ, ``projector='auto'`` learns
    a linear map ([..., D]) or a 1x1 convolution ([B, C, H, W]) from the student's width to the teacher's, trained with
    the student and never exported; ``projector='none'`` refuses. ``likeness`` compares [..., D] position by position
    (channels are moved last); attention_transfer takes maps as they are, of any widths, so it needs no projector.
    Maps become one number per example; [B, T, D] one per position. Terms: ``features.<student path>``.
    Raises ShapeError with both shapes when the rest of the shapes do not fit.
    """

    pairs: Any  # Mapping[str, str], kept as a tuple of (student path, teacher path)
    likeness: Likeness = mean_squared
    projector: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        given = self.pairs
        pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple((str(p[0]), str(p[1])) for p in given)
        if not pairs:
            raise UsageError("MatchFeatures needs at least one pair {student path: teacher path}.")
        if len({ours for ours, _ in pairs}) < len(pairs):
            raise UsageError(f"a student path occurs twice in {pairs}. Add a second MatchFeatures in a Mix for it.")
        if self.projector not in ("auto", "none"):
            raise UsageError(f"projector is {self.projector!r}; choose 'auto' or 'none'.")
        object.__setattr__(self, "pairs", pairs)

    @property
    def student_features(self) -> tuple[str, ...]:
        return tuple(_module_of(ours) for ours, _ in self.pairs)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return tuple(_module_of(theirs) for _, theirs in self.pairs)

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
            if have != want and objective.projector == "auto" and not _takes_maps(objective.likeness):
                made = nn.Conv2d(have, want, 1) if mine.dim() == 4 else nn.Linear(have, want)
                self.projectors[_key(ours)] = made.to(device=mine.device, dtype=mine.dtype)

    def forward(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        return _compare(self.objective, self.projectors, student, teacher, batch)


def _compare(
    objective: MatchFeatures, projectors: Any, student: Signal, teacher: Signal, batch: Batch
) -> Mapping[str, Tensor]:
    found = {}
    for ours, theirs in objective.pairs:
        mine, wanted = feature(student, ours, "student"), feature(teacher, theirs, "teacher").detach()
        wanted = wanted.to(mine.device)
        if _key(ours) in projectors:
            mine = projectors[_key(ours)](mine)
        counted = counted_positions(batch).to(mine.device)
        if _takes_maps(objective.likeness):
            found[f"features.{ours}"] = _by_example(objective.likeness, mine, wanted, counted)
            continue
        if mine.shape != wanted.shape:
            raise _do_not_fit(ours, mine, theirs, wanted)
        if mine.dim() == 4:  # [B, C, H, W]: the channels are the features, the places are averaged
            mine, wanted = mine.movedim(1, -1), wanted.movedim(1, -1)
        found[f"features.{ours}"] = _by_position(objective.likeness, mine, wanted, counted)
    return found


def _by_example(likeness: Likeness, ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
    """likeness [B] between the examples with a position that counts; 0 for the others."""
    chosen = counted.reshape(len(ours), -1).any(1)
    return where_counted(chosen, lambda where: likeness(ours[where], theirs[where]))


def _by_position(likeness: Likeness, mine: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """likeness [positions], of the counted ones; what lies between the positions and D is averaged."""
    if mine.shape[: counted.dim()] != counted.shape:
        raise ShapeError(f"a feature has shape {list(mine.shape)}, but the positions are {list(counted.shape)}.")

    def compute(where: Tensor | slice) -> Tensor:
        values = likeness(mine[where], wanted[where])
        if values.shape != mine[where].shape[:-1]:
            raise ShapeError(
                f"the likeness made {list(values.shape)} of features {list(mine[where].shape)}; MatchFeatures needs "
                "one that compares position by position, such as mean_squared or cosine. For relations: MatchRelations."
            )
        kept = 1 if isinstance(where, Tensor) else counted.dim()
        return values.flatten(kept).mean(-1) if values.dim() > kept else values

    return where_counted(counted, compute)


def feature(signal: Signal, path: str, whose: str) -> Tensor:
    """The feature at ``path``, or a SignalError that says what is there and how to get it."""
    if path not in signal.features:
        raise SignalError(
            f"an objective needs the {whose}'s features[{path!r}], but it gives {list(signal.given)}. "
            f"Give the model features=({path!r},), or record again with keep=Features(({path!r},))."
        )
    return signal.features[path]


def _takes_maps(likeness: Likeness) -> bool:
    return likeness is attention_transfer


def _do_not_fit(ours: str, mine: Tensor, theirs: str, wanted: Tensor) -> ShapeError:
    return ShapeError(
        f"the student's {ours!r} gives {list(mine.shape)} and the teacher's {theirs!r} gives {list(wanted.shape)}; "
        "only the feature width can be projected. Pair modules whose other sizes agree."
    )


def _module_of(path: str) -> str:
    return path.partition("#")[0]  # 'path#2' is the second call of the module at 'path'


def _key(path: str) -> str:
    return path.replace(".", "/")  # nn.ModuleDict refuses dots


@dataclass(frozen=True)
class MatchRelations:
    """The relations between the examples of a batch match: RKD (Park et al. 2019), on values or one feature each.

    Its value depends on which examples share a batch: refused under accumulation and on several ranks. Examples that
    a mask [B] leaves out are in no relation. Term: ``match_relations`` [B].
    """

    relation: Likeness = relational_distance
    student_path: str | None = None
    teacher_path: str | None = None

    @property
    def couples_examples(self) -> bool:
        return True

    @property
    def student_features(self) -> tuple[str, ...]:
        return (_module_of(self.student_path),) if self.student_path else ()

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return (_module_of(self.teacher_path),) if self.teacher_path else ()

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        who = "MatchRelations"
        ours = feature(student, self.student_path, "student") if self.student_path else student.need_values(who)
        theirs = feature(teacher, self.teacher_path, "teacher") if self.teacher_path else teacher.need_values(who)
        ours, theirs = ours.flatten(1), theirs.detach().to(ours.device).flatten(1)
        counted = counted_positions(batch).to(ours.device)
        return {"match_relations": _by_example(self.relation, ours, theirs, counted)}

"""Is the shipped file still the student? Both answer every example; what differs is measured and has its limits."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ParityError
from stillroom.exporting.apart import Runtime
from stillroom.exporting.artifact import Artifact, Tensors, output_of
from stillroom.exporting.dimensions import Dimensions, by_dimension
from stillroom.measures import METRICS, bootstrap, latency, paired_bootstrap
from stillroom.measures.bootstrap import median_interval
from stillroom.progress import Step
from stillroom.students.networks import Student
from stillroom.types import Batch, Examples, Metric, Signal, positions

BATCH = 64
SINGLES = 32  # examples asked one by one: for latency, and for what a batch changes
RUNS = 100  # at least, of each latency
WORST = 5  # examples named when the artefact fails


@dataclass(frozen=True)
class Tolerance:
    """How far the artefact may be from its student. None = not checked.

    Of a language model: ``difference`` in nats of the log-probabilities of the student's five likeliest next tokens,
    ``error`` the mean KL(student || artefact) in nats, ``quality`` relative bits per byte.
    """

    difference: float | None  # the largest difference, relative to max(1, the largest |answer| of the student)
    agreement: (
        float | None
    )  # logits: the least share of equal top-1 answers; near ties do not count where difference does
    error: float | None  # values: root mean square difference, relative to the values' standard deviation
    quality: float | None  # how much worse the task's quality may be (relative for a metric where lower is better)
    # values: the largest |difference| of one dimension, relative to that dimension's range in the student's answers. A
    # mean hides it: int8 policies with 0.3 of error in one action, of a range of 2, have the mean error of float32
    largest_value: float | None = None


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(difference=1e-4, agreement=1.0, error=None, quality=None),
    "fp16": Tolerance(difference=1e-2, agreement=0.99, error=0.01, quality=0.01, largest_value=0.01),
    "int8": Tolerance(difference=None, agreement=0.97, error=0.1, quality=0.02, largest_value=0.1),
}
# Of a student that computes in the very integers it ships. int8: a runtime's sums may fall on the other side of a half.
TRAINED: Mapping[str, Tolerance] = {
    "int8": Tolerance(difference=0.05, agreement=0.99, error=0.03, quality=0.005),
    "int4": TOLERANCES["fp32"],
}


@dataclass
class _Found:
    """What has been seen so far, in sums; nothing that grows with the examples but their statistics [B, S]."""

    largest: float = 0.0
    scale: float = 1.0  # the largest |answer| of the student, at least 1
    finite: bool = True
    absolute: float = 0.0
    squared: float = 0.0
    sums: Tensor | None = None  # of the student's values, their squares and their count: [3, D]
    dimensions: Dimensions | None = None
    numbers: int = 0
    places: int = 0
    gaps: list[float] = field(
        default_factory=list
    )  # one per place with another top-1: what the student had between them
    worst: list[tuple[bool, float, int, str, Any, Any]] = field(default_factory=list)
    statistics: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))


def compare(
    student: Student, artifact: Artifact, examples: Examples, metric: Metric | None, tolerance: Tolerance, step: Step
) -> tuple[dict[str, Any], list[str]]:
    """What verify.json says of all examples, and the sentences about what is beyond the tolerance.

    ``student`` is in evaluation mode on the CPU. Only positions inside the mask are compared; the quality is over
    labelled examples, and null without any.
    """
    metric = metric or METRICS["accuracy" if student.answers == "logits" else "r2"]
    found = _Found()
    for start in range(0, len(examples), BATCH):
        batch = examples.batch(range(start, min(start + BATCH, len(examples))), None)
        with torch.no_grad():
            ours, theirs = student(batch), artifact(batch)
        _add(found, batch, output_of(ours, student.answers), output_of(theirs, student.answers), student)
        if batch.labels is not None:
            for kept, signal in zip(found.statistics, (ours, theirs), strict=True):
                kept.append(metric.statistics(signal, ours, batch).cpu())
        step(len(batch))
    values = student.answers == "values"
    disagreements = len(found.gaps)
    near = sum(gap <= 2 * tolerance.difference * found.scale for gap in found.gaps) if tolerance.difference else 0
    mine, before = (torch.cat(side) if side else None for side in found.statistics)
    quality, worse = quality_of(mine, before, metric, tolerance.quality)
    said = {
        "examples": len(examples),
        "largest_difference": found.largest if found.finite else None,
        "mean_difference": found.absolute / max(found.numbers, 1) if found.finite else None,
        "relative_error": _relative_error(found) if values and found.finite else None,
        "largest_value": found.dimensions.describe() if found.dimensions and found.finite else None,
        "agreement": None if values else 1 - disagreements / max(found.places, 1),
        "near_ties": near,
        "quality": quality,
        "tolerance": dataclasses.asdict(tolerance),
    }
    problems = [*_beyond(found, said, tolerance, disagreements - near), *worse]
    return said, problems


def _add(found: _Found, batch: Batch, ours: Tensor, theirs: Tensor, student: Student) -> None:
    if ours.shape != theirs.shape:
        raise ParityError(f"the student answers {list(ours.shape)}, the artefact {list(theirs.shape)}.")
    counted = positions(batch, ours.shape[:-1], ours.device)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # -inf on both sides is no difference
    difference = (ours.double() - theirs.double()).abs().masked_fill(same, 0.0)
    difference = difference.masked_fill(~counted.unsqueeze(-1), 0.0)
    found.finite &= bool(difference.isfinite().all())
    difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
    by_place = difference.amax(-1)
    used = ours[counted].double()
    found.largest = max(found.largest, float(difference.max()))
    found.scale = max(found.scale, float(used[used.isfinite()].abs().max()) if used.isfinite().any() else 1.0)
    found.absolute += float(difference.sum())
    found.squared += float(difference.square().sum())
    found.numbers += used.numel()
    found.places += int(counted.sum())
    flipped = torch.zeros_like(counted)
    if student.answers == "logits":
        chosen, other = ours.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)
        gap = (ours.gather(-1, chosen) - ours.gather(-1, other)).squeeze(-1)
        # Equal logits of one student are a tie whatever their order.
        flipped = (chosen != other).squeeze(-1) & (gap > 0) & counted
        found.gaps.extend(gap[flipped].tolist())
    else:
        rows = used.reshape(-1, used.shape[-1])
        sums = torch.stack([rows.sum(0), rows.square().sum(0), torch.full_like(rows[:0].sum(0), len(rows))])
        found.sums = sums if found.sums is None else found.sums + sums
        names = [name for name, row in zip(batch.ids, counted.reshape(len(batch), -1), strict=True) for _ in row]
        kept = [name for name, counts in zip(names, counted.flatten().tolist(), strict=True) if counts]
        found.dimensions = by_dimension(rows, theirs[counted].double().reshape(rows.shape), kept, found.dimensions)
    _keep_worst(found, batch, ours, theirs, flipped, by_place, student)


def _keep_worst(
    found: _Found, batch: Batch, ours: Tensor, theirs: Tensor, flipped: Tensor, by_place: Tensor, student: Student
) -> None:
    """The examples with another answer first, then those with the largest difference."""
    rows = len(batch)
    flipped, by_place = flipped.reshape(rows, -1), by_place.reshape(rows, -1)
    flat = (ours.reshape(rows, -1, ours.shape[-1]), theirs.reshape(rows, -1, ours.shape[-1]))
    for row in range(rows):
        mask = flipped[row] if flipped[row].any() else torch.ones_like(flipped[row])
        place = int(by_place[row].masked_fill(~mask, -1.0).argmax())
        key = (bool(flipped[row].any()), float(by_place[row, place]), found.places * BATCH + row)
        answers = [_shown(side[row, place], student) for side in flat]
        item = (*key, batch.ids[row], *answers)
        (heapq.heappush if len(found.worst) < WORST else heapq.heappushpop)(found.worst, item)


def _shown(answer: Tensor, student: Student) -> Any:
    """The class by name or number, or the values, for an error message."""
    if student.answers == "values":
        return [round(number, 4) for number in answer.flatten().tolist()[:4]]
    index = int(answer.argmax())
    return student.classes[index] if student.classes and index < len(student.classes) else index


def _relative_error(found: _Found) -> float:
    """Root mean square difference over the standard deviation of the student's values (pooled over their D columns)."""
    assert found.sums is not None
    total, squares, count = found.sums
    spread = float((squares - total.square() / count.clamp(min=1)).clamp(min=0).sum())
    return math.sqrt(found.squared / spread) if spread > 0 else (0.0 if found.squared == 0 else math.inf)


def quality_of(
    ours: Tensor | None, theirs: Tensor | None, metric: Metric, allowed: float | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The task's quality of both from their statistics [N, S], and a sentence when the artefact is worse than allowed.

    A loss that the paired interval over examples cannot tell from none is not held against it.
    """
    mine = None if theirs is None else bootstrap(theirs[None], metric.finish)
    before = None if ours is None else bootstrap(ours[None], metric.finish)
    if mine is None or before is None or ours is None or theirs is None:
        return None, []
    said = {"metric": metric.name, **mine.as_json(), "student": before.as_json()}
    change = paired_bootstrap(theirs[None], ours[None], metric.finish)
    if allowed is None or change is None or metric.higher_is_better is None:
        return said, []
    better = metric.higher_is_better
    loss, certain = (-change.value, change.high < 0) if better else (change.value, change.low > 0)
    limit = allowed if better else allowed * abs(before.value)
    if loss <= limit or not certain:
        return said, []
    return said, [f"{metric.name} is {mine.value:.4f}, the student's {before.value:.4f} (allowed loss {limit:.4f})"]


def _beyond(found: _Found, said: Mapping[str, Any], tolerance: Tolerance, disagreements: int) -> list[str]:
    problems = [] if found.finite else ["it answers with numbers that are not finite where the student's are"]
    if found.finite and tolerance.difference is not None and found.largest > tolerance.difference * found.scale:
        limit = tolerance.difference * found.scale
        problems.append(f"the largest difference is {found.largest:.3g} (allowed {limit:.3g})")
    # Of few answers a single one is more than 3 %: what is allowed is rounded up.
    if said["agreement"] is not None and tolerance.agreement is not None:
        allowed = math.ceil((1 - tolerance.agreement) * found.places - 1e-9)
        if disagreements > allowed:
            problems.append(
                f"{disagreements} of {found.places} answers are another class (agreement {said['agreement']:.4f}, "
                f"needed {tolerance.agreement})"
            )
    error = said["relative_error"]
    if error is not None and tolerance.error is not None and error > tolerance.error:
        problems.append(f"the relative error of its values is {error:.3g} (allowed {tolerance.error})")
    if found.dimensions and found.finite and tolerance.largest_value is not None:
        problems.extend(found.dimensions.beyond(tolerance.largest_value))
    said_worst = sorted(found.worst, reverse=True)
    if problems:
        named = "; ".join(f"{name}: student {ours!r}, artefact {theirs!r}" for *_, name, ours, theirs in said_worst)
        problems.append(f"worst examples: {named}")
    return problems


def times(artifact: Artifact, adapter: Callable[..., Tensors], singles: Sequence[Batch]) -> dict[str, Any]:
    """Seconds of one answer at batch 1: from prepared tensors (the runtime alone), and from raw columns end to end."""
    prepared = {batch.ids[0]: adapter(batch.inputs) for batch in singles}
    if isinstance(artifact.run, Runtime):  # in another process, and the way there is no part of the runtime
        together = tuple(torch.cat(parts) for parts in zip(*prepared.values(), strict=True))
        alone = median_interval(artifact.run.seconds(together, RUNS), seed=0)
    else:
        alone = latency(lambda batch: Signal(values=artifact.run(prepared[batch.ids[0]])), singles, runs=RUNS)
    whole = latency(artifact, singles, runs=RUNS)
    assert alone is not None
    assert whole is not None
    said = {"median_seconds": alone.value, "low": alone.low, "high": alone.high}
    end_to_end = {"median_seconds": whole.value, "low": whole.low, "high": whole.high}
    return {"batch": 1, "threads": 1, "runs": RUNS, **said, "end_to_end": end_to_end}


def batch_effect(artifact: Artifact, examples: Examples, singles: Sequence[Batch]) -> float | None:
    """The largest difference between answers given one by one and in one batch; null when lengths cannot be batched.

    Dynamic int8 scales its activations by what else is in the batch, so this is not always 0.
    """
    together = output_of(artifact(examples.batch(range(len(singles)), None)), artifact.answers)
    one_by_one = [output_of(artifact(single), artifact.answers) for single in singles]
    if any(one.shape[1:] != together.shape[1:] for one in one_by_one):
        return None
    difference = float((torch.cat(one_by_one) - together).abs().nan_to_num(0.0).max())
    return difference if math.isfinite(difference) else None

"""The threshold of a cascade: chosen on rows that nothing else saw, measured on others, written into the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.digests import key_hash
from stillroom.errors import DataError, FolderError, SignalError, UsageError
from stillroom.files import read_json, write_json
from stillroom.measures.bootstrap import bootstrap
from stillroom.measures.selective import GRID, Kept, choose_threshold, keep_above
from stillroom.progress import bar
from stillroom.run import Run, open_run, seal
from stillroom.students.networks import load_student
from stillroom.types import UNLABELLED, Batch, Dense, Model, identity_of

FORMAT = "stillroom-cascade/1"
FILE = "report/cascade.json"
ROWS = 256  # asked at once
Against = Literal["labels", "teacher"]


@dataclass(frozen=True)
class Answered:
    """What student and teacher said of some rows: [N] each."""

    confidence: Tensor
    student: Tensor  # class numbers
    teacher: Tensor
    labels: Tensor  # UNLABELLED where unknown

    def wrong(self, against: Against) -> Tensor:
        """Where the student's answer is not the label's, or not the teacher's."""
        return self.student != (self.labels if against == "labels" else self.teacher)

    def right(self, threshold: float, against: Against) -> Tensor:
        """Where the cascade's answer is right: the student's where it is sure, the teacher's elsewhere; float [N]."""
        said = torch.where(self.confidence >= threshold, self.student, self.teacher)
        return (said == (self.labels if against == "labels" else self.teacher)).double()


def threshold_of(
    folder: Path,
    risk: float,
    delta: float = 0.05,
    against: Against | None = None,
    files: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The content of report/cascade.json: read where it is of this student and these settings, else made and sealed.

    ``against``: what counts as wrong: the label (the default where there are labels), or another answer than the
    teacher's. Raises UsageError for a student without classes, FolderError for a signed run that lacks it.
    """
    run = open_run(folder, progress=progress, files=files or Path())
    student = load_student(folder / "student", run.base)
    asked = {"risk": risk, "delta": delta, "student": student.identity.digest}
    path = folder / FILE
    if path.is_file():
        found = read_json(path)
        if all(found[key] == value for key, value in asked.items()) and against in (None, found["against"]):
            return found
    if (folder / "signature").exists():
        raise FolderError(f"{folder} is signed, and {FILE} would change it. Choose the threshold first, then sign.")
    if run.recipe.speaks:
        raise UsageError("a cascade is for classes: a language model's answers have no one confidence.")
    found = {"format": FORMAT, **asked, **_chosen(run, student, risk, delta, against)}
    write_json(path, found)
    seal(folder)
    return found


def _chosen(run: Run, student: Any, risk: float, delta: float, against: Against | None) -> dict[str, Any]:
    first, second, where = _halves(run)
    with bar("asking student and teacher", len(first) + len(second), shown=run.progress) as step:
        one, two = (_answered(student, run.teacher, rows, step) for rows in (first, second))
    labelled = bool((one.labels != UNLABELLED).all() and (two.labels != UNLABELLED).all())
    against = against or ("labels" if labelled else "teacher")
    if against == "labels" and not labelled:
        raise DataError("not every held-out row has a label: choose --against teacher.")
    kept = choose_threshold(one.confidence, one.wrong(against), risk, delta)
    thresholds: set[float] = {*GRID, *((kept.threshold,) if kept else ())}
    points = [_point(two, threshold, against) for threshold in sorted(thresholds)]
    return {
        "against": against,
        "teacher": identity_of(run.teacher).name,
        "threshold": kept.threshold if kept else None,
        "chosen_on": {"rows": len(first), "where": where, **(_said(kept, delta) if kept else {})},
        "measured_on": {"rows": len(second), "where": where},
        "measured": _point(two, kept.threshold if kept else 2.0, against),
        "curve": points,
    }


def _said(kept: Kept, delta: float) -> dict[str, Any]:
    return {"kept": kept.kept, "wrong": kept.wrong, "upper": kept.upper(delta)}


def _point(said: Answered, threshold: float, against: Against) -> dict[str, Any]:
    """At a threshold: the share that reaches the teacher, the cascade's quality, the error among kept answers."""
    kept = keep_above(said.confidence, said.wrong(against), threshold)
    quality = bootstrap(said.right(threshold, against)[None, :, None], lambda rows: float(rows.mean()), 500)
    error = kept.wrong / kept.kept if kept.kept else None
    return {
        "threshold": threshold,
        "asked": 1 - kept.share,
        "quality": quality.as_json() if quality else None,
        "kept_error": error,
    }


def _halves(run: Run) -> tuple[Any, Any, str]:
    """Rows to choose on and rows to measure on: validation and test where there are both, else halves of the test."""
    if run.recipe.data.validation is not None or (run.recipe.data.split and run.recipe.data.split.validation > 0):
        return run.data["validation"], run.test, "chosen on the validation rows, measured on the test rows"
    rows = run.test
    sides = [[n for n, name in enumerate(rows.ids) if key_hash(name, -1) % 2 == side] for side in (0, 1)]
    if not all(sides):
        raise DataError(f"{len(rows)} test rows are too few to choose a threshold on.")
    return rows.select(sides[0]), rows.select(sides[1]), "chosen on half of the test rows, measured on the other half"


@torch.no_grad()
def _answered(student: Any, teacher: Model, rows: Any, step: Any) -> Answered:
    parts: list[Sequence[Tensor]] = []
    for start in range(0, len(rows), ROWS):
        batch = rows.batch(range(start, min(start + ROWS, len(rows))), None)
        ours, theirs = _shares(student.predict, batch), _shares(teacher, batch)
        labels = batch.labels if batch.labels is not None else torch.full((len(batch),), UNLABELLED)
        if labels.is_floating_point() or labels.dim() != 1:
            raise UsageError("a cascade is for classes: a regression's answers have no confidence.")
        parts.append((ours.amax(-1), ours.argmax(-1), theirs.argmax(-1), labels))
        step(len(batch))
    confidence, ours, theirs, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return Answered(confidence.clamp(0, 1), ours, theirs, labels)


def _shares(model: Any, batch: Batch) -> Tensor:
    logits = model(batch).need_logits("a cascade")
    if not isinstance(logits, Dense):
        raise SignalError("a cascade needs all logits of student and teacher.")
    return logits.values.float().softmax(-1).cpu()


def told(found: Mapping[str, Any]) -> str:
    """The choice in words, for people."""
    sure, of = f"{1 - found['delta']:.0%}", "the labels" if found["against"] == "labels" else "its teacher"
    if found["threshold"] is None:
        return (
            f"No threshold keeps the error against {of} at most {found['risk']:.1%} with {sure} certainty: every "
            "question goes to the teacher. Allow more risk (--risk), or hold out more rows."
        )
    point, quality = found["measured"], found["measured"]["quality"]
    error = "" if point["kept_error"] is None else f", {point['kept_error']:.1%} of the kept answers wrong"
    return (
        f"The student answers where its confidence is at least {found['threshold']:.4f}: with {sure} certainty at most "
        f"{found['risk']:.1%} of these answers differ from {of}. On {found['measured_on']['rows']:,} other rows "
        f"{point['asked']:.1%} of the questions reach the teacher{error}, quality {quality['value']:.4f} "
        f"({quality['low']:.4f} to {quality['high']:.4f})."
    )

"""A student of an earlier run as a teacher: distillation in steps, large to middle to small."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from stillroom.errors import MissingFileError
from stillroom.students.networks import CONFIG, Student, load_student
from stillroom.types import Batch, Identity, Signal


@dataclass(frozen=True, eq=False)
class Teaching:
    """A trained student that answers as a teacher, a Model: evaluation mode, no gradient, and the run it came from."""

    student: Student
    identity: Identity

    def __call__(self, batch: Batch) -> Signal:
        return self.student.predict(batch)

    def with_features(self, paths: tuple[str, ...]) -> Teaching:
        """The same teacher that also gives the outputs of these modules."""
        return dataclasses.replace(self, student=self.student.with_features(paths))


def from_run(run: str | Path, *, folder: Path | None = None, licence: str = "unknown") -> Teaching:
    """The student of a run's folder (or of a student's own folder) as a teacher.

    Looked up from ``folder`` first. Raises MissingFileError when no student lies there.
    """
    for place in ((folder or Path()) / run, Path(run)):
        for found in (place, place / "student"):
            if (found / CONFIG).is_file():
                student = load_student(found, folder)
                source = f"run {place.resolve().name}"
                identity = dataclasses.replace(student.identity, kind="network", licence=licence, source=source)
                return Teaching(student, identity)
    raise MissingFileError(
        f"{run} holds no student (looked for {CONFIG} there and in student/). Finish that run first."
    )

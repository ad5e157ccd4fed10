"""Every stage's folder opens again: one function that looks at what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.errors import MissingFileError
from stillroom.evaluation import load_report
from stillroom.exporting import load_artifact
from stillroom.recording import open_recording
from stillroom.students.networks import load_student


def load(folder: str | Path, base: str | Path | None = None) -> Any:
    """What a folder holds: a Student, Recording, Report or Artifact; of a whole run, its student.

    A student or artefact answers new inputs: ``load("runs/x").predict({"text": ("wheat prices rose",)})``.
    ``base``: where a factory or adapter in a file of your own is looked up, by default the current folder.
    Raises MissingFileError when there is nothing to open.
    """
    folder = Path(folder)
    base = Path(base) if base is not None else None
    openers: dict[str, Any] = {
        "student.json": lambda: load_student(folder, base),
        "artifact.json": lambda: load_artifact(folder, base),
        "report.json": lambda: load_report(folder),
        "shards": lambda: open_recording(folder, base),
        "student/student.json": lambda: load_student(folder / "student", base),
    }
    for mark, opens in openers.items():
        if (folder / mark).exists():
            return opens()
    raise MissingFileError(
        f"{folder} holds no student, recording, report, artefact or run (looked for {', '.join(openers)})."
    )

"""Reading a run's folder for the page. Every file is optional: a page is made of what is there. Runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import FolderError, MissingFileError
from stillroom.files import read_json


@dataclass(frozen=True)
class Curve:
    """One training: which row it belongs to, which seed, and its logged steps."""

    row: str
    seed: str
    steps: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Stages:
    """What was found in a run folder; None or empty where a stage has not run."""

    folder: Path
    report: Mapping[str, Any] | None
    harness: Mapping[str, Any] | None
    cascade: Mapping[str, Any] | None
    money: Mapping[str, Any] | None
    driving: Mapping[str, Any] | None
    replay: Mapping[str, Any] | None
    curves: tuple[Curve, ...]
    exports: tuple[Mapping[str, Any], ...]
    recording: Mapping[str, Any] | None
    student: Mapping[str, Any] | None
    passport: Mapping[str, Any] | None
    parents: Mapping[str, Mapping[str, Any]]  # sha256 of a parent's passport -> the passport


def read_stages(folder: Path) -> Stages:
    """Raises MissingFileError when the folder does not exist, FolderError for a file that cannot be read."""
    if not folder.is_dir():
        raise MissingFileError(f"{folder} does not exist. Give the folder of a run.")
    return Stages(
        folder=folder,
        report=_optional(folder / "report" / "report.json"),
        harness=_optional(folder / "report" / "harness.json"),
        cascade=_optional(folder / "report" / "cascade.json"),
        money=_optional(folder / "report" / "money.json"),
        driving=_optional(folder / "report" / "driving.json"),
        replay=_optional(folder / "report" / "replay.json"),
        curves=tuple(_curves(folder)),
        exports=tuple(read_json(path) for path in sorted(folder.glob("exports/*/verify.json"))),
        recording=_optional(folder / "recording" / "manifest.json"),
        student=_optional(folder / "student" / "student.json"),
        passport=_optional(folder / "passport.json"),
        parents={path.stem: read_json(path) for path in sorted(folder.glob("parents/*.json"))},
    )


def _optional(path: Path) -> Mapping[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _curves(folder: Path) -> list[Curve]:
    """student/, alone/ and seeds/*/student ...: the first seed lies at the top of the run."""
    found = []
    for row in ("student", "alone"):
        for path in sorted([*folder.glob(f"{row}*/history.jsonl"), *folder.glob(f"seeds/*/{row}*/history.jsonl")]):
            inside = path.relative_to(folder).parts
            steps = _history(path)
            if steps:
                found.append(Curve(row, inside[1] if inside[0] == "seeds" else "0", steps))
    return found


def _history(path: Path) -> list[Mapping[str, Any]]:
    steps = []
    for count, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            steps.append(json.loads(line))
        except ValueError as error:
            raise FolderError(
                f"{path}, line {count} is not readable as JSON ({error}). Restore or delete it."
            ) from None
    return steps

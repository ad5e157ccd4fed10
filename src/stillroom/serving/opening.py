"""From a run's folder to what is served: the student or an artefact, and the columns of its questions."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from stillroom.errors import MissingFileError, StillroomError, UsageError
from stillroom.files import read_json
from stillroom.loading import load
from stillroom.run import open_run
from stillroom.serving.app import Serving
from stillroom.serving.cascade import Cascade
from stillroom.serving.journal import Journal
from stillroom.serving.language import LanguageServing
from stillroom.serving.questions import raw_columns
from stillroom.serving.writer import Writer
from stillroom.types import Batch, identity_of


def open_serving(run: Path, artifact: str | None = None, files: Path | None = None) -> Serving:
    """What ``stillroom serve RUN`` serves: the PyTorch student, or with ``artifact`` an export (exports/onnx-int8).

    The columns' types and the example come from the run's test rows; where its data cannot be read any more, from
    what the adapter says. Raises MissingFileError for a folder without a student, UsageError for a language model's
    artefact.
    """
    place = _place(run, artifact)
    model = load(place, files)
    if not hasattr(model, "adapter"):
        raise UsageError(f"{place} holds a {type(model).__name__}; serve a run, a student or an artefact.")
    if artifact is not None and model.answers == "next_token":
        raise UsageError(
            f"{artifact} is a language model: llama.cpp serves GGUF files with the same routes (llama-server -m FILE). "
            "Leave out --artifact to serve the PyTorch student."
        )
    who = identity_of(model)
    about = {"model": who.name, "digest": who.digest, "classes": list(model.classes or ()) or None}
    return Serving(
        name=run.resolve().name if artifact is None else f"{run.resolve().name}, {place.name}",
        model=model.predict,
        columns=raw_columns(model.adapter, example_of(run, files)),
        classes=model.classes,
        about=about,
    )


def open_language(run: Path, files: Path | None = None) -> LanguageServing:
    """A run's language model, to be served under the run's name."""
    student = load(run, files)
    who = identity_of(student)
    return LanguageServing(
        run.resolve().name, Writer(student.net, student.tokenizer), {"model": who.name, "digest": who.digest}
    )


def with_teacher(
    serving: Serving, run: Path, threshold: float | None, journal: Path | None = None, files: Path | None = None
) -> Serving:
    """The same, with the run's teacher asked below ``threshold`` (None: always), its answers kept in ``journal``.

    Raises UsageError for a student without classes.
    """
    if not serving.classes:
        raise UsageError("a cascade needs a student with classes: its confidence decides who answers.")
    place = journal or run.resolve().with_name(f"{run.resolve().name}-journal.jsonl")  # outside: a run is sealed
    kept = Journal(place, [raw.name for raw in serving.columns])
    teacher = open_run(run, progress=False, files=files or Path()).teacher
    second = Cascade(teacher, 2.0 if threshold is None else threshold, kept, serving.columns, serving.classes)
    return dataclasses.replace(serving, second=second, about={**serving.about, "threshold": threshold})


def is_language(run: Path) -> bool:
    """Whether the run's student is a language model."""
    for folder in (run / "student", run):
        if (folder / "student.json").is_file():
            return read_json(folder / "student.json")["answers"] == "next_token"
    return False


def example_of(run: Path, files: Path | None) -> Batch | None:
    """One test row of a run; None where there is no recipe, or its data are gone."""
    if not (run / "recipe.yaml").is_file():
        return None
    with contextlib.suppress(StillroomError, OSError, ImportError):
        rows: Any = open_run(run, claim=False, progress=False, files=files or Path()).data["test"]
        return rows.batch([0], None)
    return None


def _place(run: Path, artifact: str | None) -> Path:
    if artifact is None:
        return run
    for place in (run / artifact, Path(artifact)):
        if (place / "artifact.json").is_file():
            return place
    known = sorted(path.parent.relative_to(run).as_posix() for path in run.glob("exports/*/artifact.json"))
    raise MissingFileError(f"there is no artefact {artifact}; {run} has {', '.join(known) or 'none'}.")

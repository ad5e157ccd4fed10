"""Decoys of a run's teacher: its own recipe, carried out under other seeds. And students made to measure power.

A teacher has a recipe that can be carried out again when it is trained within it:

* a function of the user's with a parameter ``seed`` (``def teacher(examples, workspace, seed=0)``), which is all that
  a recipe has to say; the function must draw everything that is random from it;
* a student of an earlier run (``teacher: {use: run, run: FOLDER}``), which that run's own recipe trains again.

A teacher that was only loaded (weights out of a package, an endpoint) has none, and then there is no p-value.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillroom.audits.questions import log_probs_of
from stillroom.digests import data_description, json_digest, key_hash
from stillroom.errors import UsageError
from stillroom.fitting import fit
from stillroom.objectives import HardLabels
from stillroom.provenance.audit import Mode
from stillroom.recipes.named import TEACHERS, call, function_of
from stillroom.recipes.parts import plan_of
from stillroom.recipes.recipe import Use
from stillroom.recording import open_recording
from stillroom.run import Run, open_run
from stillroom.students.networks import Student
from stillroom.types import Model

LARGEST = 2**31


@dataclass(frozen=True, eq=False)
class Maker:
    """The recipe of a teacher but for its seed: ``make(seed, folder)`` carries it out; ``seed`` made the teacher."""

    recipe: str  # digest
    seed: int
    make: Callable[[int, Path], Model]

    def seeds(self, count: int, audit: int) -> tuple[int, ...]:
        """Seeds of decoys that nobody chose: they follow from the recipe's digest and the audit's own seed."""
        found: list[int] = []
        number = 0
        while len(found) < count:
            drawn = key_hash(f"decoy|{self.recipe}|{audit}", number) % LARGEST
            number += 1
            if drawn != self.seed and drawn not in found:
                found.append(drawn)
        return tuple(found)


def maker_of(run: Run) -> Maker | None:
    """How to make decoys of the run's teacher; None when its recipe cannot be carried out again."""
    use = run.recipe.teacher
    if run.recipe.tokens is not None or use.use == "ensemble":
        return None
    if use.use == "run":
        return _refitting(run, use)
    if "seed" not in inspect.signature(function_of(use, TEACHERS, run.base, "teacher")).parameters:
        return None
    return _reseeding(run, use)


def _reseeding(run: Run, use: Use) -> Maker:
    """The teacher's function, called again with another seed on the same data."""
    arguments = {name: value for name, value in use.arguments.items() if name != "seed"}
    train = run.data["train"]
    about = {
        "teacher": {"use": use.use, **arguments},
        "files": run.recipe.files,
        "data": {name: data_description(train)[name] for name in ("digest", "labels_digest")},
    }

    def make(seed: int, folder: Path) -> Model:
        offered: dict[str, Any] = {"examples": train, "folder": run.base, "workspace": folder, "progress": False}
        if train.classes is not None:
            offered["classes"] = train.classes
        return call(Use(use=use.use, **{**arguments, "seed": seed}), TEACHERS, run.base, "teacher", offered)

    return Maker(json_digest(about), int(use.arguments.get("seed", 0)), make)


def _refitting(run: Run, use: Use) -> Maker:
    """The recipe of the run whose student teaches here: the same recording, another seed."""
    place = next((p for p in (run.base / use.arguments["run"], Path(use.arguments["run"])) if p.is_dir()), None)
    if place is None or not (place / "recipe.yaml").is_file():
        raise UsageError(f"the teacher is the student of {use.arguments['run']}, and no recipe.yaml lies there.")
    parent = open_run(place, progress=False)
    recipe = parent.recipe.model_dump(mode="json", exclude={"seeds", "name", "about", "evaluate", "export"})
    about = {"run": recipe, "recording": open_recording(place / "recording", parent.base).manifest["data"]["digest"]}

    def make(seed: int, folder: Path) -> Model:
        return student_of(parent, open_recording(place / "recording", parent.base), seed, folder).predict

    return Maker(json_digest(about), parent.recipe.seeds[0], make)


def student_of(run: Run, teacher: Model, seed: int, folder: Path) -> Student:
    """A student by the run's own recipe, but from this teacher and seed."""
    pool = run.data["pool"]
    plan = plan_of(run.recipe, seed, len(pool))
    return fit(run.student(seed), teacher, pool, run.objective, plan=plan, folder=folder, progress=False)


def positive_of(run: Run, teacher: Model, mode: Mode, seed: int, folder: Path) -> Student:
    """A student that certainly learned from ``teacher``: by the run's recipe (soft), or from its labels (hard)."""
    if mode == "soft":
        return student_of(run, teacher, seed, folder)
    pool = run.data["pool"]
    said = torch.from_numpy(log_probs_of(teacher, pool.with_augment(None)).argmax(-1))
    plan = plan_of(run.recipe, seed, len(pool))
    labelled = dataclasses.replace(pool, labels=said)
    return fit(run.student(seed), None, labelled, HardLabels(), plan=plan, folder=folder, progress=False)

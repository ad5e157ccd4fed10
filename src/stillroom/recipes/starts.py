"""Untrained students of a recipe, kept where making one costs; and which of several controls is the one to beat."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stillroom.digests import json_digest
from stillroom.errors import UsageError
from stillroom.files import read_json, write_json
from stillroom.objectives import counted_positions, weighted_sum
from stillroom.recipes.named import ADAPTERS, LANGUAGE_STUDENTS, STUDENTS, call, complete, function_of
from stillroom.recipes.recipe import Recipe, Use
from stillroom.settings import name_of
from stillroom.students.networks import CONFIG, WEIGHTS, Student, load_student, save_student
from stillroom.types import Examples, Signal, identity_of

ROWS = 8  # rows answered together while a choice is made


def network_start(recipe: Recipe, seed: int, train: Any, base: Path, **known: int) -> Student:
    """A network from its factory under a seed; the adapter is fitted on the training inputs, labels unseen.

    ``known``: sizes that follow from the data (``inputs``, ``outputs``), for a factory that has such parameters.
    """
    use = recipe.student
    adapter = call(use.adapter or Use(use="columns"), ADAPTERS, base, "adapter", {"examples": train})
    make = function_of(use, STUDENTS, base, "student")
    sizes = dict(known)
    sizes |= {"classes": len(train.classes), "outputs": len(train.classes)} if train.classes else {}
    if hasattr(adapter, "size"):
        sizes["vocabulary"] = adapter.size
    return Student.make(
        use.use if ":" in use.use else name_of(make),
        complete(use, make, "student", sizes),
        seed=seed,
        folder=base,
        adapter=adapter,
        answers=use.answers,
        classes=train.classes,
        name=recipe.name,
    )


def language_start(
    recipe: Recipe, seed: int, teacher: Any, train: Examples, base: Path, folder: Path | None
) -> Student:
    """A student made from the teacher or its tokenizer; kept in ``folder``, since measuring what to cut takes minutes.

    Raises UsageError when the function returns no Student.
    """
    use = recipe.student
    made_by = {"use": use.model_dump(mode="json"), "teacher": identity_of(teacher).digest, "seed": seed}
    claim = json_digest(made_by)
    if folder is not None and _kept(folder, claim):
        return load_student(folder, base)
    offered = {"teacher": teacher, "teacher_net": teacher.net, "tokenizer": teacher.tokenizer, "examples": train}
    offered |= {"seed": seed, "folder": base, "name": recipe.name}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = call(Use(use=use.use, **use.arguments), LANGUAGE_STUDENTS, base, "student", offered)
    if not isinstance(made, Student):
        raise UsageError(f"student {use.use!r} returned {type(made).__name__}; with tokens it returns a Student.")
    if folder is not None:
        save_student(made, folder, {"start": claim, "complete": True})
    return made


def _kept(folder: Path, claim: str) -> bool:
    there = (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
    return there and read_json(folder / CONFIG).get("start") == claim


@torch.no_grad()
def best_of(tried: Mapping[Path, Student], rows: Examples, objective: Any, folder: Path) -> Student:
    """The student with the lowest mean loss on ``rows``; its folder is copied to ``folder``, with choice.json beside.

    Each was trained to the end of its own schedule: the control is given its best stopping point.
    """
    scores = {place: _loss(student, rows, objective) for place, student in tried.items()}
    best = min(scores, key=lambda place: scores[place])
    chosen = {"chosen": best.name, "loss": {place.name: score for place, score in scores.items()}}
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG) != read_json(best / CONFIG):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(best, folder)
    write_json(folder / "choice.json", chosen)
    return tried[best]


def _loss(student: Student, rows: Examples, objective: Any) -> float:
    """The objective's mean over the positions that count, without a teacher."""
    total = count = 0.0
    for start in range(0, len(rows), ROWS):
        batch = rows.batch(range(start, min(start + ROWS, len(rows))), None)
        counted = counted_positions(batch).float()
        for values in objective(student.predict(batch), Signal(), batch).values():
            total += float(weighted_sum(values, counted))
        count += float(counted.sum())
    return total / max(count, 1.0)

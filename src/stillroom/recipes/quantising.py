"""A training in two parts: in float, then in the integers that ship (``student.quantise``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.fitting import fit
from stillroom.plan import Plan
from stillroom.recipes.recipe import Quantise
from stillroom.students.networks import Student
from stillroom.students.quantised import quantised
from stillroom.types import Examples, Model


def train(
    student: Student,
    teacher: Model | None,
    rows: Examples,
    objective: Any,
    *,
    quantise: Quantise | None,
    inputs: Examples,
    folder: Path,
    plan: Plan,
    **rest: Any,
) -> Student:
    """``fit``; with ``quantise`` its last share of the steps rounded. Both parts resume, the first in float-NAME/.

    Together they take the plan's steps. ``inputs``: those that fix the ranges of int8.
    """
    if quantise is None:
        return fit(student, teacher, rows, objective, folder=folder, plan=plan, **rest)
    first, last = in_two(plan, quantise, len(rows))
    place = folder.parent / f"float-{folder.name}"
    before = fit(student, teacher, rows, objective, folder=place, plan=first, **rest)
    rounded = quantised(before, quantise.precision, inputs, group=quantise.group)
    made_by: Mapping[str, Any] = {"rounded_after": {"folder": place.name, "steps": first.steps}}
    rounded = dataclasses.replace(rounded, made_by=made_by)
    return fit(rounded, teacher, rows, objective, folder=folder, plan=last, **rest)


def in_two(plan: Plan, quantise: Quantise, rows: int) -> tuple[Plan, Plan]:
    """The plan of the float part and of the rounded part: at least one step each, as many together as the plan."""
    total = plan.total_steps(rows)
    last = min(max(1, round(total * quantise.share)), max(1, total - 1))
    rate = plan.learning_rate * quantise.learning_rate
    return (
        dataclasses.replace(plan, steps=max(1, total - last)),
        dataclasses.replace(plan, steps=last, learning_rate=rate, warmup=0.0),
    )

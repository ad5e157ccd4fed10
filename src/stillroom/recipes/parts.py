"""The parts that a recipe names, as values: objective, plan, codecs, augmentation. Built before anything is asked."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from stillroom import settings
from stillroom.data.views import Chain
from stillroom.divergences import DIVERGENCES, bind
from stillroom.errors import UsageError, nearest
from stillroom.exporting import target_of
from stillroom.fitting.devices import check_trackers
from stillroom.measures import METRICS
from stillroom.measures.texts import metrics_for
from stillroom.objectives import Mix
from stillroom.plan import Plan
from stillroom.recipes.named import (
    ADAPTERS,
    BASELINES,
    DATA,
    KEEPS,
    LANGUAGE_STUDENTS,
    OBJECTIVES,
    STUDENTS,
    TASKS,
    TEACHERS,
    VIEWS,
    call,
    complete,
    function_of,
)
from stillroom.recipes.recipe import Recipe, Use
from stillroom.teachers import ensemble

# What the run itself gives to functions that have a parameter of that name.
NAMES = (
    "examples tasks folder workspace classes inputs outputs vocabulary teacher teacher_net tokenizer seed name progress"
)
OFFERED: dict[str, Any] = dict.fromkeys(NAMES.split())


def look_up(recipe: Recipe, folder: Path) -> None:
    """Raise for any name or setting of the recipe that leads nowhere, before a teacher is built or a folder claimed."""
    objective_of(recipe.objective, folder)
    if recipe.alone is not None:
        objective_of(recipe.alone.objective, folder)
    keep_of(recipe, folder)
    augment_of(recipe.data.views, folder)
    plan_of(recipe, recipe.seeds[0])
    named: list[tuple[Use | None, dict[str, str], str]] = [
        *((use, DATA, "data") for use in (recipe.data.train, recipe.data.validation, recipe.data.test)),
        (recipe.data.source, DATA, "data"),
        (recipe.data.driving and recipe.data.driving.task, TASKS, "task"),
        *((use, TEACHERS, "teacher") for use in _members(recipe.teacher)),
        (recipe.baseline, BASELINES, "baseline"),
        (recipe.student.adapter, ADAPTERS, "adapter"),
        (recipe.student, LANGUAGE_STUDENTS if recipe.speaks else STUDENTS, "student"),
    ]
    for use, known, what in named:
        if use is not None:
            complete(use, function_of(use, known, folder, what), what, OFFERED)
    for wanted in recipe.export:
        if ":" not in wanted.target:
            target_of(wanted.target, wanted.precision)
    check_trackers(recipe.trackers, folder)
    metrics_of(recipe, folder)


def _members(use: Use) -> list[Use]:
    """The teachers that a teacher is made of: {use: ensemble, members: {name: {use: ...}, ...}, weights, mean}."""
    if use.use != "ensemble":
        return [use]
    members = use.arguments.get("members")
    if not isinstance(members, dict) or len(members) < 2 or not all(isinstance(m, dict) for m in members.values()):
        raise UsageError("a teacher {use: ensemble} needs members: {name: {use: ...}, name: {use: ...}}.")
    complete(Use(use="ensemble", **{k: v for k, v in use.arguments.items() if k != "members"}), ensemble, "teacher")
    return [found for one in members.values() for found in _members(Use(**one))]


def metrics_of(recipe: Recipe, folder: Path) -> list[Any] | None:
    """The metrics: names of stillroom.measures.METRICS, or 'my_file.py:name' of one or of a tuple of them; None leaves
    the choice to evaluate.
    """
    named, headline = recipe.evaluate.metrics, recipe.evaluate.metric
    known = METRICS if recipe.writes is None else {metric.name for metric in metrics_for(True, {})}
    for name in (*(named or ()), *((headline,) if headline else ())):
        if ":" not in name and name not in known:
            raise UsageError(f"there is no metric {name!r}{nearest(name, known)}")
    if recipe.writes is not None:
        if named is not None:
            raise UsageError("evaluate.metrics: answers in words have their own; choose only the headline, metric.")
        return None
    if headline and named is not None and headline not in named:
        raise UsageError(f"the headline {headline!r} is not among the metrics {', '.join(named)}. Add it there.")
    if named is None:
        return None
    found = [settings.resolve(name, folder) if ":" in name else name for name in named]
    return [metric for one in found for metric in (one if isinstance(one, list | tuple) else (one,))]


def headline_of(recipe: Recipe, folder: Path) -> Any | None:
    """The task's own quality of what ships: the recipe's first metric of labels. None leaves the choice to export."""
    found = metrics_of(recipe, folder) or []
    named, headline = recipe.evaluate.metrics or [], recipe.evaluate.metric
    known = {name: METRICS[m] if isinstance(m, str) else m for name, m in zip(named, found, strict=True)}
    if headline is not None and headline not in known:
        known[headline] = settings.resolve(headline, folder) if ":" in headline else METRICS[headline]
    chosen = [known[headline]] if headline is not None else list(known.values())
    return next((metric for metric in chosen if not metric.against_teacher), None)


def objective_of(use: Any, folder: Path) -> Any:
    """One objective, or a Mix: {soft_targets: 0.9, hard_labels: 0.1}, or a list of {use, settings, weight}."""
    if isinstance(use, dict):
        return Mix({objective_of(Use(use=name), folder): weight for name, weight in use.items()})
    if isinstance(use, list):
        use = [{"use": part} if isinstance(part, str) else part for part in use]
        if not all(isinstance(part, dict) and isinstance(part.get("use"), str) for part in use):
            raise UsageError("a list of objectives holds names, or {use: NAME, setting: value, weight: 0.5}.")
        weights = [_number(part.get("weight", 1.0)) for part in use]
        if not all(isinstance(w, int | float) for w in weights):
            raise UsageError(f"the weights of the objectives are numbers, not {weights}.")
        parts = [Use(**{name: value for name, value in part.items() if name != "weight"}) for part in use]
        return Mix(tuple((objective_of(part, folder), w) for part, w in zip(parts, weights, strict=True)))
    arguments = dict(use.arguments)
    if "divergence" in arguments:
        arguments["divergence"] = _divergence(arguments["divergence"])
    function = function_of(use, OBJECTIVES, folder, "objective")
    if isinstance(function, type):  # an objective with settings: a frozen dataclass
        return call(Use(use=use.use, **arguments), OBJECTIVES, folder, "objective")
    if arguments:
        raise UsageError(f"objective {use.use!r} is a function and takes no settings; make it a frozen dataclass.")
    return function


def _divergence(named: Any) -> Any:
    """A divergence from its name, or from {use: name, setting: value}; a resolved recipe names the function itself."""
    if isinstance(named, dict) and "function" in named:
        named = named["function"].rpartition(":")[2]
    if not isinstance(named, str | dict):
        raise UsageError(f"divergence is a name, or {{use: NAME, setting: value}}, not {named!r}.")
    name, bound = (named, {}) if isinstance(named, str) else (named.get("use"), {**named})
    bound.pop("use", None)
    if name not in DIVERGENCES:
        raise UsageError(f"unknown divergence {name!r}{nearest(str(name), DIVERGENCES)}")
    return bind(DIVERGENCES[name], **bound) if bound else DIVERGENCES[name]


def plan_of(recipe: Recipe, seed: int, rows: int | None = None) -> Plan:
    """The recipe's plan for a seed; ``rows`` of the pool fix its steps, so that the control has the same budget."""
    known = {field.name for field in dataclasses.fields(Plan)} - {"seed", "views"}
    for name in recipe.fit:
        if name not in known:
            raise UsageError(f"fit has no setting {name!r}{nearest(name, known)}")
    if recipe.data.views is not None and recipe.record.views is None:
        raise UsageError("data.views draws augmented views, so say in record.views how many (such as 8).")
    if recipe.data.views is None and recipe.record.views is not None:
        raise UsageError("record.views needs data.views: name the augmentation that draws them.")
    given = {name: _number(value) for name, value in recipe.fit.items()}
    try:
        plan = Plan(**{**given, "seed": seed})
    except TypeError as error:
        raise UsageError(f"fit: {error}.") from None
    # the control sees as many views as the recording holds
    views = recipe.record.views if recipe.data.views is not None else 0
    return dataclasses.replace(plan, steps=plan.total_steps(rows) if rows else plan.steps, views=views)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; here it is the number that was meant."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def keep_of(recipe: Recipe, folder: Path) -> list[Any]:
    """The codecs of the recording."""
    return [call(use, KEEPS, folder, "keep") for use in recipe.record.keep]


def augment_of(use: Use | None, folder: Path) -> Any:
    """The augmentation: one view, or {use: chain, of: [view, ...]}."""
    if use is None:
        return None
    if use.use == "chain":
        if not isinstance(use.arguments.get("of"), list):
            raise UsageError("views {use: chain} needs of: [{use: NAME, ...}, ...].")
        return Chain(tuple(call(Use(**step), VIEWS, folder, "view") for step in use.arguments["of"]))
    function = function_of(use, VIEWS, folder, "view")
    return call(use, VIEWS, folder, "view") if isinstance(function, type) else function

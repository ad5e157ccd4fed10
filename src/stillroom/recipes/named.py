"""From the names in a recipe to functions and their arguments; nothing left to a default."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stillroom import settings
from stillroom.digests import file_digest
from stillroom.errors import UsageError, nearest
from stillroom.places import without_credentials
from stillroom.recipes.declared import from_here as from_here_terms
from stillroom.recipes.recipe import Recipe, Use

# The names that a recipe may use without saying where they live. Anything else is 'module:name' or 'my_file.py:name'.
DATA = {
    "csv": "stillroom.data.tables:from_csv",
    "jsonl": "stillroom.data.tables:from_jsonl",
    "parquet": "stillroom.data.tables:from_parquet",
    "numpy": "stillroom.data.arrays:from_numpy",
    "images": "stillroom.data.images:from_image_folder",
}
TEACHERS = {
    "encoder_with_head": "stillroom.teachers.transformers:encoder_with_head",
    "sequence_classifier": "stillroom.teachers.transformers:sequence_classifier",
    "network": "stillroom.teachers.networks:from_factory",
    "onnx": "stillroom.teachers.onnx:from_onnx",
    "causal_lm": "stillroom.teachers.causal:causal_lm",
    "endpoint": "stillroom.teachers.endpoint:endpoint",
    "run": "stillroom.students.teaching:from_run",
    "published": "stillroom.teachers.published:published",
    "writer": "stillroom.teachers.writer:writer",
    "sawyer_experts": "stillroom.control.metaworld:experts",
}
TASKS = {"sawyer": "stillroom.control.metaworld:sawyer"}
STUDENTS = {
    "mlp": "stillroom.students.architectures:mlp",
    "small_cnn": "stillroom.students.architectures:small_cnn",
    "bag_of_words": "stillroom.students.architectures:bag_of_words",
}
# made from the teacher or its tokenizer, where the recipe has tokens: functions that return a Student
LANGUAGE_STUDENTS = {
    "pruned": "stillroom.students.pruned:pruned",
    "fresh": "stillroom.students.causal:fresh",
    "pretrained": "stillroom.students.causal:from_pretrained",
    "lora": "stillroom.students.causal:adapted",
}
BASELINES = {"tfidf_svm": "stillroom.students.classic:tfidf_svm", "linear": "stillroom.students.classic:linear"}
ADAPTERS = {
    "columns": "stillroom.network:Columns",
    "words": "stillroom.students.words:fit_words",
    "fingerprints": "stillroom.students.rdkit:Fingerprints",
}
OBJECTIVES = {
    "soft_targets": "stillroom.objectives:SoftTargets",
    "hard_labels": "stillroom.objectives:HardLabels",
    "match_values": "stillroom.objectives:MatchValues",
    "match_actions": "stillroom.objectives:MatchActions",
    "match_gaussians": "stillroom.objectives:MatchGaussians",
    "match_columns": "stillroom.objectives:MatchColumns",
    "match_features": "stillroom.objectives.features:MatchFeatures",
    "match_relations": "stillroom.objectives.features:MatchRelations",
}
KEEPS = {
    "everything": "stillroom.recording.codecs:Everything",
    "top_k": "stillroom.recording.codecs:TopK",
    "hidden": "stillroom.recording.hidden:Hidden",
    "likely": "stillroom.recording.likely:Likely",
    "sampled": "stillroom.recording.codecs:Sampled",
    "features": "stillroom.recording.codecs:Features",
    "texts": "stillroom.recording.texts:Texts",
}
VIEWS = {
    "shift": "stillroom.data.views:Shift",
    "flip": "stillroom.data.views:Flip",
    "noise": "stillroom.data.views:Noise",
    "word_dropout": "stillroom.data.views:WordDropout",
}

PROGRESS = "progress"


def function_of(use: Use, known: Mapping[str, str], folder: Path, what: str) -> Callable[..., Any]:
    """The function that a ``use`` names. Raises UsageError with the nearest built-in name."""
    if use.use in known:
        return settings.resolve(known[use.use])
    if ":" not in use.use:
        raise UsageError(f"unknown {what} {use.use!r}{nearest(use.use, known)} Or write 'my_file.py:function'.")
    return settings.resolve(use.use, folder)


def call(use: Use, known: Mapping[str, str], folder: Path, what: str, offered: Mapping[str, Any] | None = None) -> Any:
    """Call what ``use`` names with its arguments, and with what of ``offered`` it has a free parameter for."""
    function = function_of(use, known, folder, what)
    arguments = complete(use, function, what, offered)
    try:
        return function(**arguments)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UsageError(f"{what} {use.use!r}: {error}.") from None


def complete(
    use: Use, function: Callable[..., Any], what: str, offered: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of a call. Raises UsageError for one that the function does not take, with the nearest name."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in use.arguments:
        if name not in parameters and not takes_any:
            known = [p for p in parameters if p not in (offered or {})]
            raise UsageError(f"{what} {use.use!r} takes no {name!r}{nearest(name, known)}")
    extra = {name: value for name, value in (offered or {}).items() if name in parameters and name not in use.arguments}
    return {**use.arguments, **extra}


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with nothing left to a default: arguments filled in, own files named from here, with their digests."""
    files: dict[str, str] = {}
    table = {
        "teacher": TEACHERS,
        "student": STUDENTS | LANGUAGE_STUDENTS,
        "baseline": BASELINES,
        "adapter": ADAPTERS,
        "views": VIEWS,
    }
    table |= {"task": TASKS}
    table |= {"train": DATA, "validation": DATA, "test": DATA, "source": DATA, "keep": KEEPS, "objective": OBJECTIVES}

    def from_here(name: str) -> str:
        place, _, attribute = name.rpartition(":")
        if not place.endswith(".py"):
            return name
        path = folder / place if (folder / place).is_file() else Path(place)
        here = Path(os.path.relpath(path)).as_posix()
        files[here] = file_digest(path) if path.is_file() else "missing"
        return f"{here}:{attribute}"

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            value = {k: walk(v, "teacher" if key == "members" else k) for k, v in value.items()}
            return fill(value, key) if isinstance(value.get("use"), str) else value
        if key == "target" and isinstance(value, str):
            return from_here(value)
        if key == "url" and isinstance(value, str):  # the recipe is kept in the run
            return without_credentials(value)
        return [walk(item, key) for item in value] if isinstance(value, list) else value

    def fill(value: dict[str, Any], key: str) -> dict[str, Any]:
        value["use"] = from_here(value["use"])
        known = table.get(key, {})
        if value["use"] not in known and ":" not in value["use"]:
            return value
        function = function_of(Use(use=value["use"]), known, folder, key)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name == PROGRESS:  # how a run is watched is no part of what it is
                continue
            if parameter.default is not parameter.empty and _plain(parameter.default):
                value.setdefault(parameter.name, settings.describe(parameter.default))
        return value

    content = walk(recipe.model_dump(mode="json"), "recipe")
    content["terms"] = from_here_terms(content["terms"], folder)
    return Recipe.model_validate({**content, "files": dict(sorted(files.items()))})


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, str | bool | int | float)

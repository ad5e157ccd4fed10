"""A recipe's file: YAML to checked settings, with overrides, and the resolved recipe kept in the run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from stillroom.errors import FolderError, MissingFileError, UsageError, nearest
from stillroom.recipes.recipe import Recipe

DECLARED = "terms"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """The checked recipe of a YAML file and the folder that its files are looked up from.

    ``overrides``: 'fit.learning_rate=1e-4', values in YAML. Raises UsageError with the nearest name for a misspelt key.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist. Give the path of a recipe (YAML) or of a run's folder.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {type(content).__name__}, not a recipe (a mapping with 'name', 'data', ...).")
    for override in overrides:
        _set(content, override)
    return check_recipe(content, str(path)), path.parent


def check_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A Recipe, or a UsageError of one line that says which key, what was found, and the nearest known name."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        # a misspelt key explains the key that is missing, so it comes first
        problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            raise UsageError(f"{where}: unknown key {place!r}{nearest(str(problem['loc'][-1]), known)}") from None
        found = f" (found {problem['input']!r})" if not isinstance(problem["input"], dict) else ""
        raise UsageError(f"{where}: {place or 'recipe'}: {problem['msg']}{found}.") from None


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: Any = Recipe
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            continue
        kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_model(kind)]
        model = kinds[0] if kinds else model
    return list(model.model_fields)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _set(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UsageError(f"--set {override!r}: write key=value, such as fit.learning_rate=1e-4.")
    *path, last = key.split(".")
    place: Any = content
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise UsageError(f"--set {override!r}: {part!r} holds no keys.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    place[last] = parsed


def keep_recipe(recipe: Recipe, run_folder: Path) -> None:
    """Write recipe.yaml into the run's folder. A folder with another recipe is refused, and nothing in it changes."""
    path = run_folder / "recipe.yaml"
    content = recipe.model_dump(mode="json")
    if path.exists():
        try:
            found = yaml.safe_load(path.read_text()) or {}
            different = [key for key in content if content[key] != found.get(key) and key != DECLARED]
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
            raise FolderError(f"{path} cannot be read. Restore it, or delete the folder.") from None
        if different:
            raise FolderError(
                f"{run_folder} holds a run of another recipe (different: {', '.join(different)}). Nothing was changed. "
                "Choose another --folder or name, or delete it."
            )
        if content[DECLARED] != found.get(DECLARED):  # declarations change no number, and may be completed later
            _write(path, content)
        return
    if run_folder.exists() and not run_folder.is_dir():
        raise FolderError(f"{run_folder} is a file, not a folder. Choose another --folder.")
    if run_folder.exists() and any(run_folder.iterdir()):
        raise FolderError(f"{run_folder} is not empty and holds no recipe.yaml. Choose another --folder.")
    run_folder.mkdir(parents=True, exist_ok=True)
    _write(path, content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
    temporary.replace(path)

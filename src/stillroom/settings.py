"""Values <-> plain JSON: what ran is written down exactly, and read back as what it was.

A frozen dataclass is its own configuration: {"use": "module:Class", field: value, ...}. A function is "module:name"
or "path/file.py:name". Nothing is registered: a name says where the thing lives.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.errors import MissingFileError, UsageError, nearest


def resolve(name: str, folder: Path | None = None) -> Any:
    """The object that ``module:name`` or ``path/to/file.py:name`` names; files are looked up from ``folder``.

    Raises UsageError for a name without ':' or an unknown attribute, MissingFileError for a file that is not there.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"{name!r} names nothing: write 'module:name' or 'my_file.py:name'.")
    module = _load_file(place, folder) if place.endswith(".py") else _load_module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{place} has no {attribute!r}{nearest(attribute, vars(module))}")
        found = getattr(found, part)
    return found


def _load_module(place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and not place.startswith(error.name):
            raise
        raise UsageError(f"there is no module {place!r}. For a file of your own write 'my_file.py:name'.") from None


def _load_file(place: str, folder: Path | None) -> Any:
    path = (folder or Path()) / place
    if not path.is_file():
        path = Path(place)
    if not path.is_file():
        raise MissingFileError(f"{place} does not exist (looked in {folder or Path('.')} and in the current folder).")
    path = path.resolve()
    key = f"stillroom_user_{path.stem}_{abs(hash(str(path)))}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__dict__["__stillroom_name__"] = place
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def name_of(thing: Any) -> str:
    """The name that ``resolve`` takes back: the folder that makes it public, else the file that holds it.

    A lambda or a nested function is named, but cannot be resolved.
    """
    module = sys.modules.get(thing.__module__)
    place = getattr(module, "__stillroom_name__", thing.__module__)
    folder = place.rpartition(".")[0]  # files of a folder may be moved; what is written down stays readable
    if "." in folder and getattr(sys.modules.get(folder), thing.__qualname__, None) is thing:
        place = folder
    return f"{place}:{thing.__qualname__}"


def describe(value: Any) -> Any:
    """``value`` as plain JSON: dataclasses with their fields, functions by name, other keys as pairs."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
        return {"use": name_of(type(value)), **fields}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: describe(item) for key, item in value.items()}
        return [[describe(key), describe(item)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if callable(value) and hasattr(value, "__qualname__"):
        return {"function": name_of(value)}
    raise UsageError(f"{value!r} cannot be written down as configuration. Use plain values and frozen dataclasses.")


def rebuild(description: Any, folder: Path | None = None) -> Any:
    """The inverse of ``describe`` for dataclasses, functions and plain values; lists come back as tuples."""
    if isinstance(description, Mapping):
        if "function" in description and len(description) == 1:
            return resolve(description["function"], folder)
        items = {key: rebuild(item, folder) for key, item in description.items() if key != "use"}
        return resolve(description["use"], folder)(**items) if "use" in description else items
    if isinstance(description, list):
        return tuple(rebuild(item, folder) for item in description)
    return description

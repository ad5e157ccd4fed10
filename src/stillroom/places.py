"""Where a ready model is: 'hf:org/name', 'package:NAME/sub/folder', or a folder. Says what is known of its origin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from stillroom.errors import MissingFileError, UsageError


@dataclass(frozen=True)
class Place:
    """``name``: what a loader takes, a folder or a hub name. The rest goes into the Identity."""

    name: str
    title: str
    source: str
    licence: str = "unknown"
    local: bool = True


def locate(model: str | Path) -> Place:
    """The place of a model. Packages are found without importing them; nothing is downloaded.

    Raises UsageError for a package that is not installed, MissingFileError for a folder that is not there.
    """
    text = str(model)
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise UsageError(f"{text!r} is no hub name: write hf:organisation/model.")
        return Place(name, name, source=text, local=False)
    if text.startswith("package:"):
        return _in_package(text)
    folder = Path(text)
    if not folder.is_dir():
        raise MissingFileError(
            f"there is no folder {text}. For a model of a hub write hf:organisation/model, for one inside an installed "
            "package package:NAME/sub/folder."
        )
    return Place(
        str(folder), folder.resolve().name, source=f"folder {folder.resolve().name}", licence=_card_licence(folder)
    )


def locate_file(model: str | Path, folder: Path | None = None) -> tuple[Path, Place]:
    """A model that is one file, and its place: a path (looked up from ``folder`` first), or 'package:NAME/inner/file'.

    Raises MissingFileError for a file that is not there, UsageError for a package that is not installed.
    """
    text = str(model)
    if text.startswith("package:"):
        outer, _, name = text.rpartition("/")
        place = locate(outer or text)
        path = Path(place.name) / name
    else:
        path = next((p for p in ((folder or Path()) / text, Path(text)) if p.is_file()), Path(text))
        place = Place(str(path), path.stem, source=f"file {path.name}", licence=_card_licence(path.parent))
    if not path.is_file():
        raise MissingFileError(f"there is no file {text}. For one inside a package write package:NAME/inner/file.")
    return path, place


def without_credentials(url: str) -> str:
    """An address without user, password, query and fragment: keys hide there, and addresses are written down."""
    parts = urlsplit(url.strip())
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _in_package(text: str) -> Place:
    package, _, inner = text.removeprefix("package:").partition("/")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"package {package!r} is not installed here. Install it, or name a folder.")
    folder = Path(next(iter(spec.submodule_search_locations))) / inner
    if not folder.is_dir():
        raise MissingFileError(f"package {package!r} has no folder {inner!r}.")
    name = (_distributions().get(package.partition(".")[0]) or [package])[0]
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return Place(str(folder), package, source=f"package {package}")
    licence = str(about.json.get("license_expression") or about.json.get("license") or "unknown")
    if len(licence) > 40 or "\n" in licence:  # some packages put the whole text here
        licence = "unknown"
    return Place(str(folder), name, source=f"package {name} {about['Version']}", licence=licence)


@cache
def _distributions() -> dict[str, list[str]]:
    return {package: list(names) for package, names in metadata.packages_distributions().items()}


def _card_licence(folder: Path) -> str:
    """The licence that the model card's front matter names."""
    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    front = card.read_text(encoding="utf-8", errors="replace").split("---")
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if len(front) > 2 else None
    return found.group(1) if found else "unknown"

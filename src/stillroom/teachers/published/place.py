"""Where published answers lie (a file, a folder, 'hf:org/name' through ``datasets``), and what their card says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillroom.digests import file_digest, json_digest
from stillroom.errors import DataError, MissingFileError, UsageError, missing_extra
from stillroom.tabular import Line, files_at, lines_of

CARD = "README.md"
HUB = "hf:"


@dataclass(frozen=True)
class Source:
    """Published answers before they are read. ``digest`` is that of their files' content."""

    name: str
    source: str
    licence: str = "unknown"
    digest: str | None = None
    revision: str | None = None
    card: Path | None = None
    folder: Path | None = None  # where licence texts may lie beside them
    files: list[Path] = field(default_factory=list)
    rows: Any = None  # of a hub, as ``datasets`` gives them

    def lines(self) -> Iterator[Line]:
        """Every row, readable or not."""
        if self.rows is None:
            return lines_of(self.files)
        return (Line(f"{self.name}, row {number}", row) for number, row in enumerate(self.rows, 1))


def source_of(path: str | Path, folder: Path | None = None, split: str | None = None) -> Source:
    """Look up answers, from ``folder`` first; those of a hub are fetched by ``datasets`` (extra ``published``).

    Raises MissingFileError where nothing lies, UsageError for a split of local files.
    """
    if str(path).startswith(HUB):
        return _of_hub(str(path).removeprefix(HUB), split or "train")
    if split is not None:
        raise UsageError(f"split {split!r} is for a hub's data sets; of local files name the file or folder itself.")
    place = next((p for p in (((folder or Path()) / path), Path(path)) if p.exists()), None)
    if place is None:
        raise MissingFileError(f"{path} does not exist (looked in {folder or Path('.')}).")
    files = files_at(place)
    beside = place if place.is_dir() else place.parent
    title = place.resolve().name
    kind = "folder" if place.is_dir() else "file"
    # a file's own folder may hold anything: only a card that speaks of a data set is taken for its card
    card = beside / CARD if (beside / CARD).is_file() and (place.is_dir() or _front(beside / CARD)) else None
    digests = [[file.relative_to(beside).as_posix(), file_digest(file)] for file in files]
    return Source(
        name=title if place.is_dir() else place.stem,
        source=f"{kind} {title}",
        licence=licence_of(card),
        digest=json_digest(digests),
        card=card,
        folder=beside if place.is_dir() else None,
        files=files,
    )


def licence_of(card: Path | None) -> str:
    """The licence that a data set card names in its front matter; 'unknown' where it names none or several."""
    if card is None:
        return "unknown"
    named = _front(card).get("license")
    if isinstance(named, list):
        named = named[0] if len(named) == 1 else None
    return str(named) if isinstance(named, str) and named else "unknown"


def _front(card: Path) -> dict[str, Any]:
    """The YAML front matter of a card; empty where it has none. Raises DataError for one that is no YAML."""
    text = card.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---", 2)
    if not text.startswith("---") or len(parts) < 3:
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise DataError(f"the front matter of {card.name} is not YAML ({' '.join(str(error).split())}).") from None
    return found if isinstance(found, dict) else {}


def _of_hub(name: str, split: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "published") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"{HUB}{name}, split {split!r}, could not be had: {' '.join(str(error).split())[:300]}"
        ) from None
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row, sort_keys=True, default=str).encode())
    card = _hub_card(name)
    return Source(name, f"{HUB}{name}", licence_of(card), content.hexdigest(), _revision(card), card, rows=rows)


def _hub_card(name: str) -> Path | None:
    """The card of a hub's data set, from the hub's own cache; None where it has none."""
    if (Path(name) / CARD).is_file():  # ``datasets`` reads local folders by the same name
        return Path(name) / CARD
    from huggingface_hub import hf_hub_download  # comes with datasets
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, CARD, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError):
        return None


def _revision(card: Path | None) -> str | None:
    """The commit of a card in the hub's cache: .../snapshots/COMMIT/README.md."""
    return card.parent.name if card is not None and card.parent.parent.name == "snapshots" else None

"""The user's own copies of licence texts: found beside a model, hashed, kept in the run, compared with the table."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from stillroom.digests import file_digest
from stillroom.errors import MissingFileError, UsageError
from stillroom.files import write_bytes
from stillroom.places import locate
from stillroom.provenance.terms.table import Row, Table

FOLDER = "terms"
NAMED = re.compile(r"^(?:.*[-_.])?(?:licen[cs]e|copying|notice|terms)(?:[-_.].*)?$", re.IGNORECASE)
LARGEST = 4 << 20  # bytes; a longer file is no licence
CODE = (".py", ".pyc", ".pyi", ".so", ".json")


def words_digest(path: Path) -> str | None:
    """sha256 of the words joined by single spaces, so that line breaks do not matter; None for what is no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def row_of(path: Path, table: Table) -> Row | None:
    """The row of the table that was read from this text."""
    return table.of_text(file_digest(path), words_digest(path))


def read_row(path: Path, text: Path | None, today: str) -> dict[str, Any]:
    """A row of the user's own (YAML or JSON), with the digests of the ``text`` that it was read from.

    Raises UsageError for a file that is not there or holds no row.
    """
    for given in (path, text):
        if given is not None and not given.is_file():
            raise UsageError(f"{given} does not exist.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "id" not in content:
        raise UsageError(f"{path} holds no row: a mapping with id, title, kind, output_use, says, ...")
    if text is None:
        return content
    read = {"sha256": file_digest(text), "words_sha256": words_digest(text), "of": text.name, "seen": today}
    return {**content, "texts": [*content.get("texts", ()), read]}


def texts_beside(folder: Path, package: str | None = None) -> list[Path]:
    """LICENSE*, NOTICE*, COPYING* and *TERMS* in a model's folder, or in the package and its metadata.

    ``package``: a distribution's name. NOTICE files come last, since they are no terms by themselves.
    """
    found = {path for path in folder.glob("*") if _is_text(path)} if folder.is_dir() else set()
    if package is not None:
        try:
            files = metadata.distribution(package).files or []
        except metadata.PackageNotFoundError:
            files = []
        found |= {path for file in files if _is_text(path := Path(str(file.locate())))}
    return sorted(found, key=lambda path: ("notice" in path.name.lower(), path.name, str(path)))


def named_text(text: str, base: Path) -> Path:
    """The file that a recipe names: a path beside it, or 'package:NAME/inner/file'.

    Raises MissingFileError when it is not there.
    """
    if text.startswith("package:"):
        outer, _, name = text.rpartition("/")
        if not outer:
            raise UsageError(f"terms text {text!r}: write package:NAME/inner/file.")
        path = Path(locate(outer).name) / name
    else:
        path = base / text if (base / text).is_file() else Path(text)
    if not path.is_file():
        raise MissingFileError(f"the terms' text {path} does not exist. Name the file that you read.")
    return path


def chosen(paths: Sequence[Path], table: Table) -> Path | None:
    """The text that a row was read from, else the first that is no NOTICE; None where there is none."""
    known = [path for path in paths if row_of(path, table)]
    plain = [path for path in paths if "notice" not in path.name.lower()]
    return next(iter((*known, *plain)), None)


def keep(path: Path, run_folder: Path) -> str:
    """Copy a text to RUN/terms/SHA256.txt; its sha256."""
    sha256 = file_digest(path)
    write_bytes(run_folder / FOLDER / f"{sha256}.txt", path.read_bytes())
    return sha256


def _is_text(path: Path) -> bool:
    if not NAMED.match(path.name) or path.suffix.lower() in CODE or not path.is_file():
        return False
    return 0 < path.stat().st_size <= LARGEST

"""Reading and writing the folders where stages meet: whole or not at all, and the same bytes for the same content."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.errors import FolderError, MissingFileError


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to disk, rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """JSON for people and machines: sorted keys, two spaces, no NaN (JSON has none: write None)."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises MissingFileError, or FolderError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist.") from None
    except ValueError as error:
        raise FolderError(f"{path} is not readable as JSON ({error}). Restore it, or delete its folder.") from None


def claim_folder(folder: Path, name: str, expected: Mapping[str, Any], what: str) -> None:
    """Refuse a folder whose ``name`` (a JSON file) says that it holds something else; nothing is overwritten.

    Compares the keys of ``expected`` only. A folder without that file is free to use.
    """
    path = folder / name
    if not path.exists():
        return
    found, wanted = read_json(path), json.loads(json.dumps(expected))
    different = [line for key in wanted for line in _differences(found.get(key), wanted[key], key)]
    if different:
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        raise FolderError(
            f"{folder} already holds another {what} ({'; '.join(different[:4])}{more}). Nothing was changed. "
            "Choose another folder or delete it."
        )


def _differences(there: Any, now: Any, path: str) -> list[str]:
    """One line for each value that differs, down to the innermost key: 'plan.seed: 0 there, 1 now'."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = sorted({*there, *now})
        return [line for key in keys for line in _differences(there.get(key), now.get(key), f"{path}.{key}")]
    return [] if there == now else [f"{path}: {_short(there)} there, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 90 else text[:87] + "..."

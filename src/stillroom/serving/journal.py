"""The teacher's answers, kept before they are used: one JSON line each, appended and synchronised.

A line is a row of training data as it stands: id, the raw columns, the probabilities. ``teacher: {use: published}`` and
``data: {use: jsonl}`` read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.digests import json_digest
from stillroom.errors import FolderError, UsageError
from stillroom.tabular import jsonl_lines

OWN = ("id", "probabilities", "teacher")


class Journal:
    """Answers by question, in a file that only grows. What a crash left of a last line, which nobody saw, is cut off.

    Raises UsageError for a column of one of the journal's own names, FolderError for a file that is none.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        if taken := [name for name in columns if name in OWN]:
            raise UsageError(f"the column {taken[0]!r} has a name that the journal needs itself ({', '.join(OWN)}).")
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path)
        self._said: dict[str, Mapping[str, float]] = {}
        for line in jsonl_lines(path) if path.is_file() else ():
            if line.row is None or not {"id", "probabilities"} <= line.row.keys():
                raise FolderError(f"{path}: {line.place} is no journalled answer. Name another --journal.")
            self._said[str(line.row["id"])] = line.row["probabilities"]

    def __len__(self) -> int:
        return len(self._said)

    def get(self, inputs: Mapping[str, Any]) -> Mapping[str, float] | None:
        """What the teacher said of this question before; None where it was not asked."""
        return self._said.get(name_of(inputs))

    def add(self, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]], teacher: str) -> None:
        """Keep these answers; they are on the disk when this returns."""
        lines = [
            {"id": name_of(inputs), **inputs, "probabilities": dict(said), "teacher": teacher} for inputs, said in rows
        ]
        with open(self.path, "ab") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._said |= {line["id"]: line["probabilities"] for line in lines}


def name_of(inputs: Mapping[str, Any]) -> str:
    """The id of a question: a digest of its raw columns."""
    return f"q-{json_digest(dict(inputs))[:24]}"


def _cut(path: Path) -> None:
    """Remove what stands after the last line's end: an answer that was being written when the machine stopped."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)

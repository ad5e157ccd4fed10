"""What the bills have in common: a passport's models and data as a flat list, each with a name of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import rfc8785

from stillroom.digests import json_digest

UNKNOWN = "unknown"
NULL = "none or unknown"
TOOL = "stillroom"


@dataclass(frozen=True)
class Entry:
    """A model or data that the student learned from. ``ref`` is unique in a bill; ``said`` is the passport's part."""

    ref: str
    name: str
    said: Mapping[str, Any]
    member_of: str | None = None  # the ref of an ensemble


def teachers(passport: Mapping[str, Any]) -> list[Entry]:
    """Every teacher, and the members of ensembles after their own."""
    found: list[Entry] = []
    for index, teacher in enumerate(passport["teachers"]):
        found.extend(_members(teacher, f"teacher-{index}", None))
    return found


def _members(teacher: Mapping[str, Any], ref: str, above: str | None) -> Iterator[Entry]:
    yield Entry(ref, teacher["name"] or UNKNOWN, teacher, above)
    for index, part in enumerate(teacher["parts"]):
        yield from _members(part, f"{ref}-{index}", ref)


def data(passport: Mapping[str, Any]) -> list[Entry]:
    """The examples of every role."""
    return [Entry(f"data-{i}", part["name"] or UNKNOWN, part) for i, part in enumerate(passport["data"])]


def recorded(passport: Mapping[str, Any]) -> list[Entry]:
    """The recordings of teachers' answers: the data that a distilled student learned from."""
    return [
        Entry(f"answers-{i}", f"answers of {teacher['name']}", teacher)
        for i, teacher in enumerate(passport["teachers"])
        if teacher["recording"] is not None
    ]


def files(passport: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The student's own files, then what is shipped: path, sha256 and bytes of each."""
    return [*passport["student"]["artifacts"], *passport["exports"]]


def facts(said: Mapping[str, Any]) -> dict[str, str]:
    """What the passport says of a model or of data in one level of names, such as terms.output_use.

    Null is 'none or unknown': a passport does not always tell the two apart, and a bill must not choose.
    """
    found: dict[str, str] = {}
    for name, value in said.items():
        if name in ("name", "parts"):
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": text for inner, text in facts(value).items()}
        else:
            found[name] = _text(value)
    return found


def _text(value: Any) -> str:
    if value is None:
        return NULL
    return value if isinstance(value, str) else rfc8785.dumps(value).decode()


def is_known(text: str | None) -> bool:
    """False for what a passport says when it does not know."""
    return bool(text) and text != UNKNOWN


def version(passport: Mapping[str, Any]) -> str:
    """The version of stillroom that wrote the passport."""
    return passport["written_by"].removeprefix(f"{TOOL} ")


def digest(passport: Mapping[str, Any]) -> str:
    """The sha256 of passport.json, which is the canonical form of what it says."""
    return json_digest(passport)


def lineage(passport: Mapping[str, Any], entry: Entry) -> str:
    """How the student came from a teacher, in one sentence."""
    student = passport["student"]
    if student["init"] == "teacher-weights":
        return (
            f"The student began with weights of {student['init_from'] or 'its teacher'} and learned from {entry.name}."
        )
    starts = {"random": "began at random", "pretrained": f"began with weights of {student['init_from'] or UNKNOWN}"}
    start = starts.get(student["init"], "began nobody says how")
    return f"The student {start} and was distilled: it learned from the outputs of {entry.name}, not from its weights."

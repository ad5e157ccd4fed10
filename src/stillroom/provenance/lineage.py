"""A student that becomes a teacher passes its passport on: its teachers' terms hold for its own students too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.digests import file_digest
from stillroom.errors import CheckError
from stillroom.files import read_json, write_bytes
from stillroom.provenance.passport import PASSPORT
from stillroom.provenance.schema import validate
from stillroom.provenance.terms.gate import Access, Reason, Source
from stillroom.provenance.terms.table import Table

PARENTS = "parents"
CONFIG = "student.json"


@dataclass(frozen=True)
class Lineage:
    """A run whose student teaches, and what its passport passes on."""

    name: str
    run: Path
    passport: Mapping[str, Any]
    sources: tuple[Source, ...]  # its teachers, data and first weights, with their terms
    carried: tuple[Reason, ...]  # what was not settled of how they were reached


def lineage_of(run: str, base: Path, table: Table) -> Lineage | None:
    """What the student of a run's folder (or its own folder) passes on; None where no passport lies.

    Raises CheckError for a passport that is not valid, or is another student's.
    """
    folder = _run_folder(run, base)
    if folder is None:
        return None
    path = folder / PASSPORT
    passport = read_json(path)
    problems = validate(passport)
    if problems:
        raise CheckError(f"{path} does not fit its schema: {problems[0]}. Write it again: stillroom report {folder}")
    config = read_json(folder / "student" / CONFIG) if (folder / "student" / CONFIG).is_file() else {}
    if config.get("content_digest") != passport["student"]["content_digest"]:
        raise CheckError(f"{path} is the passport of another student. Write it again: stillroom report {folder}")
    name = passport["name"]
    return Lineage(name, folder, passport, tuple(_sources(passport, table)), tuple(_carried(passport)))


def keep_parents(lineage: Lineage, run_folder: Path) -> Iterator[dict[str, str]]:
    """Copy a parent's passport, its own parents' and the texts of their terms; yields the passport's entries.

    Raises CheckError for one that is missing, or is not the one that was passed on.
    """
    own = lineage.run / PASSPORT
    yield _keep(own, lineage.name, file_digest(own), run_folder)
    for parent in lineage.passport["parents"]:  # where it says that they lie is not followed: it is somebody's word
        sha256 = parent["passport_sha256"]
        yield _keep(lineage.run / PARENTS / f"{sha256}.json", parent["name"], sha256, run_folder)
    for text in sorted((lineage.run / "terms").glob("*.txt")):
        if not text.is_symlink() and file_digest(text) == text.stem:
            write_bytes(run_folder / "terms" / text.name, text.read_bytes())


def _keep(path: Path, name: str, sha256: str, run_folder: Path) -> dict[str, str]:
    if path.is_symlink() or not path.is_file() or file_digest(path) != sha256:
        raise CheckError(f"{path} is not the passport of {name} with the sha256 {sha256}. Restore it.")
    inside = f"{PARENTS}/{sha256}.json"
    write_bytes(run_folder / inside, path.read_bytes())
    return {"name": name, "passport_sha256": sha256, "path": inside}


def _run_folder(run: str, base: Path) -> Path | None:
    """The folder with the passport: of a run, or of the run that a student's own folder belongs to."""
    for place in (base / run, Path(run)):
        for found in (place, place.parent):
            if (found / PASSPORT).is_file() and (found == place or place.name == "student"):
                return found
    return None


def _sources(passport: Mapping[str, Any], table: Table) -> Iterator[Source]:
    """Whatever the parent's gate looked at; where it was not asked, its teachers by their licences."""
    policy, name = passport["policy"], passport["name"]
    copies = {duty["terms"]: duty["value"] for duty in policy["obligations"] if duty["id"] == "terms-copy"}
    if policy["decision"] == "not-asked":
        for teacher in _teachers(passport["teachers"]):
            rows = {row.id: row for row in (*table.find(teacher["licence"]), *table.named(teacher["name"]))}
            yield _inherited(f"teacher {teacher['name']}", name, teacher["licence"], table, list(rows), copies)
        return
    seen: dict[tuple[str, str], str] = {}
    for reason in policy["reasons"]:
        settled = reason["terms"] == "unknown" and reason["outcome"] == "allow"  # one's own data, reported
        if not settled and not str(reason["condition"]).startswith("access-"):
            seen.setdefault((reason["about"], reason["terms"]), reason["says"])
    for about, terms in seen:
        yield _inherited(about, name, "unknown", table, [terms] if terms in table.rows else [], copies)


def _inherited(
    about: str, parent: str, licence: str, table: Table, ids: list[str], copies: Mapping[str, Any]
) -> Source:
    rows = tuple(table.rows[one] for one in ids)
    text = next((str(copies[one]) for one in ids if one in copies), None)
    said = about if " (taught " in about else f"{about} (taught {parent})"
    access = Access("local-weights")  # how it was reached is settled, or carried
    name = said.partition(" ")[2]
    return Source("parent", said, name, "outputs", licence, rows, access, "unknown", text, "carried", inherited=True)


def _carried(passport: Mapping[str, Any]) -> Iterator[Reason]:
    for reason in passport["policy"]["reasons"]:
        if str(reason["condition"]).startswith("access-"):
            about = f"{reason['about']} (taught {passport['name']})"
            yield Reason(about, reason["terms"], reason["condition"], reason["outcome"], reason["says"])


def _teachers(entries: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for entry in entries:
        if entry["parts"]:
            yield from _teachers(entry["parts"])
        else:
            yield entry

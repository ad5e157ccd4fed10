"""A passport as a person reads it: opened, told in lines, compared with another, and exported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillroom.errors import CheckError, FolderError, UsageError, nearest
from stillroom.files import read_json
from stillroom.provenance import claims
from stillroom.provenance.bill import cyclonedx, eu_summary, hf_card, spdx3
from stillroom.provenance.card import unknowns
from stillroom.provenance.manifest import shown
from stillroom.provenance.passport import PASSPORT
from stillroom.provenance.schema import validate
from stillroom.provenance.signed import Trust, signer_name

FORMATS = ("cyclonedx", "spdx3", "hf-card", "eu-summary")


def open_passport(path: str | Path) -> dict[str, Any]:
    """The passport in a file, or in the folder of a run. Raises MissingFileError, FolderError, or CheckError."""
    file = Path(path) / PASSPORT if Path(path).is_dir() else Path(path)
    try:
        found = read_json(file)
        problems = validate(found)
    except RecursionError:
        raise FolderError(f"{file} is nested too deeply to be a passport.") from None
    if problems:
        raise CheckError(
            f"{file} does not fit its schema: {shown(problems[0])}. See: stillroom passport validate {file}"
        )
    return found


def problems_of(path: str | Path) -> list[str]:
    """What is wrong with a passport by its schema, a line each; [] when it is valid. Raises as ``open_passport``."""
    file = Path(path) / PASSPORT if Path(path).is_dir() else Path(path)
    try:
        return [shown(problem, 300) for problem in validate(read_json(file))]
    except RecursionError:
        raise FolderError(f"{file} is nested too deeply to be a passport.") from None


def told(passport: Mapping[str, Any]) -> list[str]:
    """A valid passport in lines: student, teachers with access and terms, data, decision, duties, what is unknown."""
    student, policy = passport["student"], passport["policy"]
    lines = [
        f"{passport['name']}, written by {passport['written_by']}, {passport['created']}",
        f"student: {student['name']}, {student['parameters'] or 'unknown'} parameters, licence {student['licence']}, "
        f"weights before training: {student['init']}{' from ' + student['init_from'] if student['init_from'] else ''}",
    ]
    for teacher in passport["teachers"]:
        lines.extend(_teacher(teacher, "teacher"))
    for data in passport["data"]:
        written = f", written by {data['generated_by']}" if data["generated_by"] else ""
        rows = "unknown" if data["rows"] is None else data["rows"]
        lines.append(f"{data['role']} data: {data['name']}, {rows} rows, licence {data['licence']}{written}")
    lines += [f"parent: {parent['name']}, passport {parent['passport_sha256']}" for parent in passport["parents"]]
    lines.append(f"decision before the teacher was asked: {policy['decision']}")
    lines += [f"  {reason['about']}, {reason['terms']}: {reason['says']}" for reason in policy["reasons"]]
    for one in policy["obligations"]:
        lines.append(f"  {'done' if one['done'] else 'OPEN'}: {one['id']} {one['value']} ({one['terms']})")
    lines += [f"  waived by {one['who']} until {one['until']}: {one['why']}" for one in policy["waivers"]]
    lines += [f"unknown: {one}" for one in unknowns(passport)]
    return [shown(line, 400) for line in lines]


def _teacher(teacher: Mapping[str, Any], role: str) -> Iterator[str]:
    access, terms = teacher["access"], teacher["terms"]
    asked = "unknown" if access["requests"] is None else access["requests"]
    yield f"{role}: {teacher['name']} ({teacher['kind']}), {teacher['source']}, licence {teacher['licence']}"
    yield f"  reached by {access['route']}, account {access['account'] or 'unknown'}, {asked} answers"
    yield f"  terms {terms['id']}: outputs {terms['output_use']}, decided by {terms['decided_by']}"
    for part in teacher["parts"]:
        yield from _teacher(part, f"  member of {teacher['name']}")


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two JSON values differ, a line each: 'teachers.0.licence: "MIT" -> "Apache-2.0"'."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            inner = f"{place}.{key}" if place else key
            if key not in one or key not in other:
                yield f"{shown(inner)}: only in the {'second' if key not in one else 'first'}"
            else:
                yield from differences(one[key], other[key], inner)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            yield from differences(first, second, f"{place}.{index}")
    elif one != other:
        yield f"{shown(place)}: {shown(json.dumps(one), 120)} -> {shown(json.dumps(other), 120)}"


def exported(passport: Mapping[str, Any], to: str, version: str | None = None, as_json: bool = False) -> str:
    """A passport in another format, as text that ends with a line. ``version``: of CycloneDX, 1.7 or 1.6.

    Raises UsageError for a format or version that is not written, CheckError where the result is not valid.
    """
    if to not in FORMATS:
        raise UsageError(f"{to!r} is no format that passports are exported to{nearest(to, FORMATS)}")
    if version is not None and to != "cyclonedx":
        raise UsageError(f"a version is chosen of cyclonedx only; {to} has one.")
    if as_json and to != "eu-summary":
        raise UsageError("--json is for eu-summary, which is Markdown without it; the other formats have one form.")
    if to == "hf-card":
        return hf_card.card(passport)
    if to == "eu-summary" and not as_json:
        return eu_summary.markdown(passport)
    made: dict[str, Callable[[], Any]] = {
        "cyclonedx": lambda: cyclonedx.bill(passport, version or cyclonedx.VERSIONS[0]),
        "spdx3": lambda: spdx3.bill(passport),
        "eu-summary": lambda: eu_summary.summary(passport),
    }
    return json.dumps(made[to](), indent=2, ensure_ascii=False) + "\n"


def verified(run_folder: str | Path, trust: Trust) -> tuple[list[str], bool]:
    """What is said of a run that verifies, and False where a claim of somebody you believe revokes it."""
    name = signer_name(run_folder)
    if name is None:
        lines = ["It is unsigned: who changed files and manifest together would not be found out."]
    elif trust.key is None and trust.certificate is None:
        lines = [f"It says that it is signed by {shown(name)}. To know that it is theirs, give --key or --certificate."]
    else:
        lines = [f"It is signed by {shown(name)}, whom you believe."]
    found = claims.read(run_folder)
    lines += [f"claim {claim}" for claim in found]
    revoked = [claim for claim in found if claim.kind == "revocation"]
    lines += [f"REVOKED by claim {claim.number}: {shown(json.dumps(claim.body))}" for claim in revoked]
    return lines, not revoked

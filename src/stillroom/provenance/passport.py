"""passport.json, built from the files that the stages wrote and from nothing else: what a student learned from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import rfc8785
import yaml

from stillroom.digests import file_digest, json_digest
from stillroom.errors import CheckError, FolderError, MissingFileError
from stillroom.files import write_bytes
from stillroom.provenance.manifest import TEMPORARY, existing, files_of
from stillroom.provenance.outcome import environment, evaluation, exports, read_part, rerun, seeds, sources
from stillroom.provenance.policy import (
    access_part,
    data_part,
    parents_part,
    policy_part,
    read_policy,
    student_name,
    terms_part,
)
from stillroom.provenance.schema import VERSION, validate

PASSPORT = "passport.json"
UNFINISHED = "checkpoint.pt"
OWN_FACTORIES = "stillroom.students.architectures:"  # all of them draw their weights from the seed
# A folder of this machine before a file's name: it says who ran this, and nothing about what was run.
PLACE = re.compile(r"(?:file://|(?<![\w:/.\\]))(?:~|[A-Za-z]:)?[/\\](?:[^/\\\s:'\"]+[/\\])+")
LARGEST_INTEGER = 2**53 - 1  # of JSON, as RFC 8785 has it


def build(run_folder: str | Path) -> dict[str, Any]:
    """The passport of a run as plain JSON, valid by its schema.

    A stage that did not run leaves null, [] or 'unknown'. Absolute paths are cut to their last part. ``created`` is
    when the newest of the files it was built from was written, so building it again gives the same bytes.
    Raises MissingFileError without a student, FolderError for a file that cannot be read, CheckError for a file that
    says something a passport cannot hold (which field).
    """
    folder = existing(run_folder)
    student = read_part(folder, "student/student.json")
    if student is None:
        raise MissingFileError(f"{folder} has no student/student.json: a passport is a student's. Train one first.")
    try:
        passport = without_places(_gathered(folder, student))
        if passport["recipe"] is not None:
            passport["run"]["recipe_sha256_canonical"] = json_digest(passport["recipe"])
        problems = validate(passport)
    except (AttributeError, TypeError, KeyError) as error:  # a list where an object belongs, and the like
        problems, passport = [str(error)], {}
    if problems:
        raise CheckError(f"{folder}: the stages' files do not make a passport: {'; '.join(problems[:3])}.")
    return passport


def _gathered(folder: Path, student: Mapping[str, Any]) -> dict[str, Any]:
    recording = read_part(folder, "recording/manifest.json")
    report = read_part(folder, "report/report.json")
    recipe, policy = _recipe(folder), read_policy(folder)
    control = (read_part(folder, "alone/student.json") or {}).get("data")
    name = student_name(policy, (recipe or {}).get("name") or student.get("name") or "unknown")
    return {
        "schema": VERSION,
        "written_by": f"stillroom {metadata.version('stillroom')}",
        "created": _created(folder),
        "name": name,
        "student": _student(folder, student) | ({"name": name} if policy else {}),
        "teachers": _teachers(folder, student, recording, policy),
        "data": _data(student, recording, report, control, policy),
        "method": {"objective": student.get("objective"), "plan": student.get("plan")},
        "recipe": recipe,
        "recipe_sha256": file_digest(folder / "recipe.yaml") if recipe is not None else None,
        "seeds": list(seeds(folder)),
        "run": rerun(folder, recipe, student),
        "environment": environment(student.get("environment") or {}),
        "evaluation": evaluation(report) if report else None,
        "exports": list(exports(folder)),
        "policy": policy_part(policy, folder, name),
        "parents": parents_part(policy),
        "built_from": [_digest(folder, path) for path in sources(folder)],
    }


def write_passport(run_folder: str | Path) -> Path:
    """Write passport.json as canonical JSON (RFC 8785). Raises what ``build`` raises."""
    path = Path(run_folder) / PASSPORT
    write_bytes(path, rfc8785.dumps(build(run_folder)))
    return path


def without_places(value: Any) -> Any:
    """Plain JSON without this machine's folders, and with numbers that JSON can hold."""
    if isinstance(value, str):
        return PLACE.sub("", value)
    if isinstance(value, Mapping):
        return {without_places(str(key)): without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) <= LARGEST_INTEGER else str(value)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    return without_places(str(value))


def _recipe(folder: Path) -> dict[str, Any] | None:
    path = folder / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FolderError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise FolderError(f"{path} holds {type(found).__name__}, not a recipe.")
    return found


def _digest(folder: Path, path: str) -> dict[str, Any]:
    return {"path": path, "sha256": file_digest(folder / path), "bytes": (folder / path).stat().st_size}


def _created(folder: Path) -> str:
    newest = max((folder / path).stat().st_mtime for path in sources(folder))
    return datetime.fromtimestamp(int(newest), tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _student(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    factory = (config.get("source") or {}).get("factory")
    own = isinstance(factory, str) and factory.startswith(OWN_FACTORIES)
    plain, _ = files_of(folder / "student")
    shipped = [n for n in plain if not n.endswith(TEMPORARY) and n != UNFINISHED and not n.startswith("trackers/")]
    return {
        "name": config.get("name", "unknown"),
        "init": config.get("init", "random" if own else "unknown"),
        "init_from": config.get("init_from"),
        "licence": config.get("licence", "unknown"),
        "factory": factory,
        "answers": config.get("answers", "unknown"),
        "classes": config.get("classes"),
        "parameters": config.get("parameters"),
        "content_digest": config.get("content_digest"),
        "artifacts": [_digest(folder, f"student/{name}") for name in sorted(shipped)],
    }


def _teachers(
    folder: Path, student: Mapping[str, Any], recording: Mapping[str, Any] | None, policy: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The recording's teacher when the student learned from that recording, else the one that student.json names."""
    said = student.get("teacher")
    if said is None:
        return []
    if recording is None or student.get("recording") != json_digest(recording):
        return [{**_member(said, policy), "signals": None, "recording": None, "requests": None}]
    shards = recording.get("shards") or {}
    kept = recording.get("keep") or []
    asked = sum(shard["rows"] for shard in shards.values())
    teacher = _member(recording.get("teacher") or said, policy)
    teacher["access"]["requests"] = asked
    return [
        {
            **teacher,
            "signals": [_call(codec) for codec in (kept if isinstance(kept, list) else [kept])],
            "recording": file_digest(folder / "recording/manifest.json"),
            "requests": asked,
        }
    ]


def _member(identity: Mapping[str, Any], policy: Mapping[str, Any] | None, place: str = "teacher") -> dict[str, Any]:
    said = {name: identity.get(name, "unknown") for name in ("name", "kind", "licence", "route", "source")}
    parts = [_member(part, policy, f"{place}.{n}") for n, part in enumerate(identity.get("parts") or ())]
    return {
        **said,
        "digest": identity.get("digest"),
        "revision": identity.get("revision"),
        "access": access_part(policy, place, identity),
        "terms": terms_part(policy, place),
        "decode": identity.get("decode"),
        "parts": parts,
    }


def _call(described: Any) -> str:
    """A described dataclass as one would write it: TopK(k=64)."""
    if not isinstance(described, Mapping):
        return str(described)
    name = str(described.get("use", "unknown")).rpartition(":")[2]
    return f"{name}({', '.join(f'{key}={value}' for key, value in described.items() if key != 'use')})"


def _data(
    student: Mapping[str, Any],
    recording: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    control: Mapping[str, Any] | None,
    policy: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    trained, recorded = student.get("data"), (recording or {}).get("data")
    found = [_one_data("training", trained, policy)] if trained else []
    if recorded and recorded.get("digest") != (trained or {}).get("digest"):
        found.append(_one_data("recorded", recorded, policy))
    if control and control.get("digest") != (trained or {}).get("digest"):
        found.append(_one_data("control", control, policy))
    if report:
        found.append(_one_data("evaluation", {"rows": report.get("examples"), **(report.get("data") or {})}, policy))
    return found


def _one_data(role: str, said: Mapping[str, Any], policy: Mapping[str, Any] | None) -> dict[str, Any]:
    named = {name: said.get(name, "unknown") for name in ("name", "licence", "source")}
    counted = {name: said.get(name) for name in ("digest", "labels_digest", "rows", "labelled")}
    return {"role": role, **named, **counted, **data_part(policy, role)}

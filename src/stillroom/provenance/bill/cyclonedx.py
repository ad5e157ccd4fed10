"""CycloneDX ML-BOM, 1.6 or 1.7, as JSON. Needs the extra ``bom``, as validator.

The JSON is written here because the library's own objects lose model cards, data and formulation on the way. Teachers
are the student's ``pedigree.ancestors`` (with a note that says how); examples and recorded answers are components of
type data, named by the model card; the run is a workflow of the formulation. What the format has no field for
(terms, access) is in ``properties``, under ``stillroom:``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from stillroom.errors import CheckError, UsageError, missing_extra, nearest
from stillroom.provenance.bill import words
from stillroom.provenance.bill.words import Entry

VERSIONS = ("1.7", "1.6")
NAMESPACE = uuid.UUID("5b1f1f0e-5f0c-5d6a-9d0e-3c7f2f6c2a11")  # of the serial numbers, which follow from the passport


def bill(passport: Mapping[str, Any], version: str = VERSIONS[0]) -> dict[str, Any]:
    """The bill of a valid passport, valid by the strict schema of ``version``. The same passport gives the same bill.

    Raises UsageError for another version, CheckError when the result is not valid (a defect, or a name too odd).
    """
    if version not in VERSIONS:
        raise UsageError(f"CycloneDX {version!r} is not written{nearest(version, VERSIONS)}")
    sources = [*words.data(passport), *words.recorded(passport)]
    teachers = words.teachers(passport)
    found = {
        "$schema": f"http://cyclonedx.org/schema/bom-{version}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": version,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, words.digest(passport))}",
        "version": 1,
        "metadata": {
            "timestamp": passport["created"],
            "tools": {"components": [{"type": "application", "name": words.TOOL, "version": words.version(passport)}]},
            "component": _student(passport, teachers, sources),
            "properties": _properties({"passport.sha256": words.digest(passport), **_policy(passport)}),
        },
        "components": [*map(_teacher, teachers), *map(_data, sources)],
        "dependencies": [
            {"ref": "student", "dependsOn": [entry.ref for entry in (*teachers, *sources)]},
            *({"ref": entry.ref} for entry in (*teachers, *sources)),
        ],
        "formulation": [_formulation(passport, sources)],
    }
    _validate(found, version)
    return found


def _student(passport: Mapping[str, Any], teachers: list[Entry], sources: list[Entry]) -> dict[str, Any]:
    student = passport["student"]
    names = ("init", "init_from", "factory", "answers", "parameters", "content_digest")
    found = {
        "type": "machine-learning-model",
        "bom-ref": "student",
        "name": passport["name"],
        **_licences(student["licence"]),
        "components": [
            {"type": "file", "bom-ref": f"file-{index}", "name": file["path"], "hashes": [_sha256(file["sha256"])]}
            for index, file in enumerate(words.files(passport))
        ],
        "modelCard": {
            "modelParameters": {"datasets": [{"ref": entry.ref} for entry in sources]},
            **_measured(passport),
        },
        "properties": _properties(words.facts({name: student[name] for name in names})),
    }
    if teachers:
        found["pedigree"] = {
            "ancestors": [_named(entry) for entry in teachers],
            "notes": " ".join(words.lineage(passport, entry) for entry in teachers if entry.member_of is None),
        }
    if passport["parents"]:
        found["externalReferences"] = [
            {
                "type": "attestation",
                "url": parent["path"],
                "comment": "the passport of a teacher that was distilled itself",
                "hashes": [_sha256(parent["passport_sha256"])],
            }
            for parent in passport["parents"]
        ]
    return found


def _named(entry: Entry) -> dict[str, Any]:
    """A teacher as an ancestor: the component itself, with its terms, stands in the list of components."""
    return {"type": "machine-learning-model", "name": entry.name, **_licences(entry.said["licence"])}


def _teacher(entry: Entry) -> dict[str, Any]:
    above = {"member_of": entry.member_of} if entry.member_of else {}
    properties = _properties({**words.facts(entry.said), **above})
    return {**_named(entry), "bom-ref": entry.ref, "properties": properties}


def _data(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "data", "bom-ref": entry.ref, "name": entry.name}
    if "recording" in entry.said:  # a teacher's answers; recording/manifest.json digests every shard of them
        about = {name: entry.said[name] for name in ("signals", "requests", "digest")}
        found["hashes"] = [_sha256(entry.said["recording"])]
    else:
        about = dict(entry.said)
        found |= _licences(entry.said["licence"])
    return {**found, "data": [{"type": "dataset", "name": entry.name}], "properties": _properties(words.facts(about))}


def _measured(passport: Mapping[str, Any]) -> dict[str, Any]:
    cells = ((passport["evaluation"] or {}).get("rows") or {}).get("student") or {}
    found = [
        {
            "type": name,
            "value": repr(cell["value"]),
            "confidenceInterval": {"lowerBound": repr(cell["low"]), "upperBound": repr(cell["high"])},
        }
        for name, cell in cells.items()
        if cell is not None
    ]
    return {"quantitativeAnalysis": {"performanceMetrics": found}} if found else {}


def _formulation(passport: Mapping[str, Any], sources: list[Entry]) -> dict[str, Any]:
    workflow: dict[str, Any] = {
        "bom-ref": "run",
        "uid": passport["recipe_sha256"] or words.digest(passport),
        "name": "distillation",
        "taskTypes": ["build"],
        "outputs": [{"type": "artifact", "resource": {"ref": "student"}}],
        "properties": _properties(words.facts({**passport["run"], "method": passport["method"]})),
    }
    if sources:
        workflow["inputs"] = [{"resource": {"ref": entry.ref}} for entry in sources]
    return {"bom-ref": "formula", "workflows": [workflow]}


def _policy(passport: Mapping[str, Any]) -> dict[str, str]:
    policy = passport["policy"]
    obligations = {
        f"policy.obligation.{index}": f"{one['id']} (from {one['from_teacher']}): {'done' if one['done'] else 'open'}"
        for index, one in enumerate(policy["obligations"])
    }
    return {"policy.decision": policy["decision"], **obligations}


def _licences(said: str) -> dict[str, Any]:
    """An SPDX id or expression where the licence is one, else the name that was given; nothing when nobody knows."""
    if not words.is_known(said):
        return {}
    try:
        from cyclonedx.spdx import fixup_id, is_expression
    except ImportError:
        raise missing_extra("cyclonedx-python-lib", "bom") from None
    known = fixup_id(said)
    if known is None and is_expression(said):
        return {"licenses": [{"expression": said}]}
    return {"licenses": [{"license": {"id": known} if known else {"name": said}}]}


def _sha256(content: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": content}


def _properties(facts: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"stillroom:{name}", "value": value} for name, value in sorted(facts.items())]


def _validate(found: Mapping[str, Any], version: str) -> None:
    try:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError:
        raise missing_extra("cyclonedx-python-lib", "bom") from None
    error = JsonStrictValidator(SchemaVersion.from_version(version)).validate_str(json.dumps(found))
    if error is not None:
        said = str(getattr(error, "data", error))[:300]
        raise CheckError(f"this passport makes no valid CycloneDX {version}: {said}.")

"""policy.json: what the gate was asked and what it decided, kept in the run's folder and read into the passport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillroom.provenance.outcome import read_part
from stillroom.provenance.terms.gate import Decision, Facts, Source
from stillroom.provenance.terms.obligations import missing

POLICY = "policy.json"
FORMAT = "stillroom-policy/1"
USES = ("forbidden", "unknown", "conditional", "permitted")  # strictest first
UNKNOWN_ACCESS = {
    "route": "unknown",
    "account": None,
    "requests": None,
    "tokens": None,
    "evasion_declared_none": None,
    "reasoning_traces": "unknown",
}
UNKNOWN_TERMS = {
    "id": "unknown",
    "output_use": "unknown",
    "text_sha256": None,
    "in_force": None,
    "decided_by": "nobody",
    "table_version": None,
}
NOT_ASKED = {"decision": "not-asked", "reasons": [], "obligations": [], "waivers": [], "table_version": None}


def read_policy(folder: Path) -> dict[str, Any] | None:
    """policy.json of a run; None when the gate was not asked. Raises FolderError when it is not an object."""
    return read_part(folder, POLICY)


def described(
    sources: Sequence[Source], facts: Facts, version: str, decision: Decision, parents: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """policy.json: the question and the answer, as plain JSON."""
    return {
        "format": FORMAT,
        "table_version": version,
        "decision": decision.outcome,
        "reasons": [asdict(reason) for reason in decision.reasons],
        "obligations": [{**asdict(duty), "done": False} for duty in decision.obligations],
        "waivers": [],
        "facts": {**asdict(facts), "met": sorted(facts.met)},
        "sources": [_described(source, version) for source in sources],
        "parents": [dict(parent) for parent in parents],
    }


def _described(source: Source, version: str) -> dict[str, Any]:
    access = asdict(source.access)
    access["evasion_declared_none"] = access.pop("evasion_none")
    strictest = [use for use in USES if use in {row.output_use for row in source.rows}]
    return {
        "place": source.place,
        "about": source.about,
        "name": source.name,
        "role": source.role,
        "licence": source.licence,
        "inherited": source.inherited,
        "access": access,
        "terms": {
            "id": " AND ".join(row.id for row in source.rows) or "unknown",
            "output_use": strictest[0] if strictest else "unknown",
            "text_sha256": source.text,
            "in_force": source.in_force,
            "decided_by": ("human" if source.declared else "table") if source.rows else "nobody",
            "table_version": version if source.rows else None,
        },
    }


def policy_part(policy: Mapping[str, Any] | None, folder: Path, name: str) -> dict[str, Any]:
    """The passport's policy: the decision, its reasons, waivers, and the obligations with what is done of them.

    ``name``: the student's, which an obligation may be about.
    """
    if policy is None:
        return dict(NOT_ASKED)
    open_ones = {number for number, _, _ in missing(folder, policy["obligations"], name)}
    duties = [{**duty, "done": number not in open_ones} for number, duty in enumerate(policy["obligations"])]
    said = {part: policy[part] for part in NOT_ASKED if part not in ("decision", "obligations")}
    return {"decision": policy["decision"], **said, "obligations": duties}


def student_name(policy: Mapping[str, Any] | None, otherwise: str) -> str:
    """What the student is called when it goes out."""
    return str(((policy or {}).get("facts") or {}).get("student_name") or otherwise)


def terms_part(policy: Mapping[str, Any] | None, place: str) -> dict[str, Any]:
    """The terms of one source ('teacher', or 'teacher.0' of an ensemble), unknown where the gate did not look at it."""
    return {**UNKNOWN_TERMS, **(_source(policy, place).get("terms") or {})}


def access_part(policy: Mapping[str, Any] | None, place: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """How one source was reached: as declared, else as the teacher's own identity says its route."""
    said = {**UNKNOWN_ACCESS, **(_source(policy, place).get("access") or {})}
    if said["route"] == "unknown":
        said["route"] = identity.get("route") or "unknown"
    return said


def data_part(policy: Mapping[str, Any] | None, role: str) -> dict[str, Any]:
    """Which model wrote the data that the student learned from, and between which days, as declared."""
    said = ((policy or {}).get("data") or {}) if role in ("training", "recorded") else {}
    return {name: said.get(name) for name in ("generated_by", "generated_from", "generated_to")}


def parents_part(policy: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The teachers that are students of other runs: their names, passports' digests and places in this folder."""
    return [dict(parent) for parent in (policy or {}).get("parents") or ()]


def _source(policy: Mapping[str, Any] | None, place: str) -> Mapping[str, Any]:
    return next((source for source in (policy or {}).get("sources") or () if source.get("place") == place), {})

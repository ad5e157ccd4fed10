"""policy.json: what the gate was asked and what it decided, kept in the run's folder and read into the passport."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.provenance.outcome import read_part

POLICY = "policy.json"
FORMAT = "stillroom-policy/1"
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


def policy_part(policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """The passport's policy: the decision, its reasons, obligations and waivers."""
    if policy is None:
        return dict(NOT_ASKED)
    return {"decision": policy["decision"], **{name: policy[name] for name in NOT_ASKED if name != "decision"}}


def terms_part(policy: Mapping[str, Any] | None, about: str) -> dict[str, Any]:
    """The terms of one source ('teacher', 'teacher.NAME'), unknown where the gate did not look at it."""
    return {**UNKNOWN_TERMS, **(_source(policy, about).get("terms") or {})}


def access_part(policy: Mapping[str, Any] | None, about: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """How one source was reached: as declared, else as the teacher's own identity says its route."""
    said = {**UNKNOWN_ACCESS, **(_source(policy, about).get("access") or {})}
    if said["route"] == "unknown":
        said["route"] = identity.get("route") or "unknown"
    return said


def data_part(policy: Mapping[str, Any] | None, role: str) -> dict[str, Any]:
    """Which model wrote the data of a role, and between which days, as declared."""
    said = _source(policy, f"data.{role}")
    return {name: said.get(name) for name in ("generated_by", "generated_from", "generated_to")}


def parents_part(policy: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The teachers that are students of other runs: their names, passports' digests and places in this folder."""
    return [dict(parent) for parent in (policy or {}).get("parents") or ()]


def _source(policy: Mapping[str, Any] | None, about: str) -> Mapping[str, Any]:
    return next((source for source in (policy or {}).get("sources") or () if source.get("about") == about), {})

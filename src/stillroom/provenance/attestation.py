"""The signed statement: in-toto v1 with a SLSA v1 provenance predicate, which names teachers and data as dependencies.

in-toto attestation v1 (Statement, ResourceDescriptor), SLSA v1.0 (Provenance). It is written from the passport alone,
so that the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stillroom.errors import CheckError, MissingExtraError, missing_extra
from stillroom.provenance.manifest import MANIFEST, MODEL_SIG, STATEMENT, Mismatch
from stillroom.provenance.passport import PASSPORT

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:stillroom:distillation:1"
BUILDER = "urn:stillroom:run"
CONTENT = "stillroomContent"  # the digest of weights or examples, whatever file they lie in; 'sha256' is of a file
BYPRODUCTS = (PASSPORT, MANIFEST, MODEL_SIG)


def statement(passport: Mapping[str, Any], digests: Mapping[str, str], claims: Mapping[str, Any] | None) -> Any:
    """The statement of a valid passport, as plain JSON.

    ``digests``: sha256 of passport, manifest and model.sig by path. ``claims``: {"count", "head_sha256"} of the claims
    that were there when the run was signed, None when there were none.
    """
    version = passport["written_by"].removeprefix("stillroom ")
    said = [{"name": path, "digest": {"sha256": digests[path]}} for path in BYPRODUCTS]
    recipe = {"recipe_sha256": passport["recipe_sha256"], "method": passport["method"]}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": entry["path"], "digest": {"sha256": entry["sha256"]}}
            for entry in [*passport["student"]["artifacts"], *passport["exports"]]
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"name": passport["name"], **recipe},
                "internalParameters": {"claims": claims},
                "resolvedDependencies": list(_dependencies(passport)),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"stillroom": version}},
                "metadata": {"finishedOn": passport["created"]},
                "byproducts": said,
            },
        },
    }


def check_form(value: Any) -> None:
    """Raise CheckError unless the standard's own library reads an in-toto statement with SLSA provenance."""
    try:
        from google.protobuf import json_format
        from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
        from in_toto_attestation.v1 import statement_pb2
        from in_toto_attestation.v1.statement import Statement
    except ImportError:
        raise missing_extra("in-toto-attestation", "sign") from None
    try:
        message = json_format.ParseDict(value, statement_pb2.Statement())  # pyright: ignore[reportAttributeAccessIssue]
        Statement.copy_from_pb(message).validate()
        json_format.ParseDict(value["predicate"], provenance_pb2.Provenance())  # pyright: ignore[reportAttributeAccessIssue]
    except (ValueError, LookupError, TypeError, json_format.Error) as error:
        raise CheckError(f"not an in-toto statement: {' '.join(str(error).split())[:200]}.") from None


def disagreements(said: Any, passport: Mapping[str, Any], digests: Mapping[str, str | None]) -> list[Mismatch]:
    """Where a signed statement (of any shape) and the run differ: its byproducts, then what the passport says."""
    try:
        check_form(said)
        named = {entry["name"]: entry["digest"]["sha256"] for entry in said["predicate"]["runDetails"]["byproducts"]}
        claims = said["predicate"]["buildDefinition"]["internalParameters"]["claims"]
    except MissingExtraError:
        raise
    except Exception as error:  # signed, but by whom? it may be of any shape
        return [Mismatch(STATEMENT, "changed", f"It is not a statement of a run ({type(error).__name__}).")]
    found = [
        Mismatch(path, "changed", f"Its sha256 is {digests.get(path)}; the signed statement says {named.get(path)}.")
        for path in BYPRODUCTS
        if digests.get(path) != named.get(path)
    ]
    expected = statement(passport, {path: str(named.get(path)) for path in BYPRODUCTS}, claims)
    if said != expected and not any(mismatch.path == PASSPORT for mismatch in found):
        where = _first_difference(said, expected, "")
        found.append(Mismatch(STATEMENT, "changed", f"It says something else than the passport: {where}."))
    return found


def claims_when_signed(said: Any) -> Mapping[str, Any] | None:
    """{"count", "head_sha256"} of the claims that were there when a run was signed."""
    try:
        claims = said["predicate"]["buildDefinition"]["internalParameters"]["claims"]
        return {"count": int(claims["count"]), "head_sha256": str(claims["head_sha256"])} if claims else None
    except (LookupError, TypeError, ValueError):
        return None


def _dependencies(passport: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for teacher in passport["teachers"]:
        yield from _teacher(teacher, "teacher", teacher.get("recording"))
    for data in passport["data"]:
        names = ("role", "licence", "source", "rows", "generated_by")
        about = {"role": f"data: {data['role']}", **{name: data.get(name) for name in names[1:]}}
        yield _dependency(data["name"], data["digest"], about)
    if passport["student"]["init_from"]:
        yield _dependency(passport["student"]["init_from"], None, {"role": "initial weights"})
    for parent in passport["parents"]:
        about = {"role": "passport of a teacher", "path": parent["path"]}
        yield {**_dependency(parent["name"], None, about), "digest": {"sha256": parent["passport_sha256"]}}


def _teacher(teacher: Mapping[str, Any], role: str, recording: str | None) -> Iterator[dict[str, Any]]:
    about = {name: teacher.get(name) for name in ("kind", "licence", "source", "revision")}
    yield _dependency(
        teacher["name"],
        teacher["digest"],
        {"role": role, "access": teacher.get("access"), "terms": teacher.get("terms"), **about},
    )
    if recording is not None:
        about = {"role": "the teacher's answers", "of": teacher["name"], "requests": teacher["requests"]}
        yield {**_dependency("recording/manifest.json", None, about), "digest": {"sha256": recording}}
    for part in teacher["parts"]:
        yield from _teacher(part, f"member of {teacher['name']}", None)


def _dependency(name: str, digest: str | None, about: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in about.items() if value is not None}
    found: dict[str, Any] = {"name": name or "unknown", "annotations": known}
    return {**found, "digest": {CONTENT: digest}} if digest else found


def _first_difference(one: Any, other: Any, place: str) -> str:
    """The first place where two different JSON values differ, such as predicate.buildDefinition.buildType."""
    pairs: Iterator[tuple[Any, Any, Any]] = iter(())
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((key, one.get(key), other.get(key)) for key in sorted({*one, *other}))
    elif isinstance(one, list) and isinstance(other, list):
        pairs = ((index, a, b) for index, (a, b) in enumerate(zip(one, other, strict=False)))
    for key, a, b in pairs:
        if a != b:
            return _first_difference(a, b, f"{place}.{key}" if place else str(key))
    return place or "its form"

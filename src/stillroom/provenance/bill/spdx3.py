"""SPDX 3.0.1 with the AI and Dataset profiles, as JSON-LD. Needs the extra ``bom``: its objects refuse what is no SPDX.

SPDX has no word for distillation: the student was ``trainedOn`` the answers, which the teacher ``generates``, and is
``descendantOf`` the teacher, with a comment that says how. Every package has one declared licence (what the passport
says) and one concluded (nobody concluded anything: no assertion), as the AI profile asks.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from stillroom.errors import CheckError, missing_extra
from stillroom.provenance.bill import words
from stillroom.provenance.bill.words import Entry

NO_ASSERTION = "https://spdx.org/rdf/3.0.1/terms/ExpandedLicensing/NoAssertionLicense"
PROFILES = ("core", "software", "simpleLicensing", "ai", "dataset")


@dataclass(frozen=True)
class Document:
    """The objects of one document as they are made; ``place`` is what every id begins with."""

    spdx: Any
    place: str
    info: Any
    objects: list[Any] = field(default_factory=list)

    def make(self, kind: str, ref: str, /, **properties: Any) -> Any:
        """An object with an id of its own, put into the document."""
        made = getattr(self.spdx, kind)(_id=f"{self.place}{ref}", creationInfo=self.info, **properties)
        self.objects.append(made)
        return made

    def relate(self, name: str, one: Any, how: str, others: Iterable[Any], comment: str | None = None) -> None:
        """A relationship, unless there is nobody to relate to."""
        to = list(others)
        if to:
            kind = getattr(self.spdx.RelationshipType, how)
            about = {} if comment is None else {"comment": comment}
            self.make("Relationship", f"relation-{name}", from_=one, relationshipType=kind, to=to, **about)


def bill(passport: Mapping[str, Any]) -> dict[str, Any]:
    """The SPDX document of a valid passport. The same passport gives the same document.

    Raises CheckError when the library does not read it again as SPDX 3.0.1.
    """
    document = _document(passport)
    student = _student(document, passport)
    teachers = {entry.ref: _model(document, entry) for entry in words.teachers(passport)}
    for entry in words.teachers(passport):
        name, model = entry.ref, teachers[entry.ref]
        document.relate(f"student-{name}", student, "descendantOf", [model], words.lineage(passport, entry))
        if entry.member_of is not None:
            document.relate(f"{entry.member_of}-{name}", teachers[entry.member_of], "contains", [model])
    answers = {entry.ref: _answers(document, entry) for entry in words.recorded(passport)}
    for ref, made in answers.items():
        document.relate(ref, teachers[ref.replace("answers", "teacher")], "generates", [made])
    by_role = {entry.ref: (entry.said["role"], _dataset(document, entry)) for entry in words.data(passport)}
    learned = [made for role, made in by_role.values() if role in ("training", "recorded")]
    document.relate("trained", student, "trainedOn", [*learned, *answers.values()])
    document.relate("tested", student, "testedOn", [made for role, made in by_role.values() if role == "evaluation"])
    document.make(
        "SpdxDocument",
        "document",
        name=f"{passport['name']}: what the student learned from",
        rootElement=[student],
        element=[one for one in document.objects if one is not document.info],
        profileConformance=[getattr(document.spdx.ProfileIdentifierType, name) for name in PROFILES],
    )
    return _written(document)


def _document(passport: Mapping[str, Any]) -> Document:
    spdx = _library()
    place = f"urn:stillroom:{words.digest(passport)}#"
    created = datetime.strptime(passport["created"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    info = spdx.CreationInfo(_id="_:creation", specVersion="3.0.1", created=created)
    agent = spdx.SoftwareAgent(_id=f"{place}stillroom", name=passport["written_by"], creationInfo=info)
    info.createdBy.append(agent)
    return Document(spdx, place, info, [info, agent])


def _student(document: Document, passport: Mapping[str, Any]) -> Any:
    said = passport["student"]
    training = {"method": passport["method"], "run": passport["run"], "policy": passport["policy"]["decision"]}
    made = document.make(
        "ai_AIPackage",
        "student",
        name=passport["name"],
        software_primaryPurpose=document.spdx.software_SoftwarePurpose.model,
        ai_informationAboutTraining=json.dumps(training, sort_keys=True),
        comment=_facts({name: said[name] for name in ("init", "init_from", "content_digest", "parameters")}),
    )
    for name, value in sorted(words.facts({"plan": passport["method"]["plan"]}).items()):
        made.ai_hyperparameter.append(document.spdx.DictionaryEntry(key=name, value=value))
    for name, cell in (((passport["evaluation"] or {}).get("rows") or {}).get("student") or {}).items():
        if cell is not None:
            text = f"{cell['value']!r} [{cell['low']!r}, {cell['high']!r}]"
            made.ai_metric.append(document.spdx.DictionaryEntry(key=name, value=text))
    files = [
        document.make(
            "software_File", f"file-{i}", name=file["path"], verifiedUsing=[_sha256(document, file["sha256"])]
        )
        for i, file in enumerate(words.files(passport))
    ]
    document.relate("files", made, "contains", files)
    for index, parent in enumerate(passport["parents"]):
        hashed = [_sha256(document, parent["passport_sha256"])]
        file = document.make("software_File", f"parent-{index}", name=parent["path"], verifiedUsing=hashed)
        document.relate(f"parent-{index}", made, "hasEvidence", [file], f"the passport of {parent['name']}")
    _licences(document, made, "student", said["licence"])
    return made


def _model(document: Document, entry: Entry) -> Any:
    made = document.make(
        "ai_AIPackage",
        entry.ref,
        name=entry.name,
        software_primaryPurpose=document.spdx.software_SoftwarePurpose.model,
        comment=_facts(entry.said),
    )
    if entry.said["revision"] is not None:
        made.software_packageVersion = entry.said["revision"]
    _licences(document, made, entry.ref, entry.said["licence"])
    return made


def _answers(document: Document, entry: Entry) -> Any:
    """A recording: what it is of, and the digest of its manifest, which digests every shard."""
    size = {} if entry.said["requests"] is None else {"dataset_datasetSize": entry.said["requests"]}
    made = document.make(
        "dataset_DatasetPackage",
        entry.ref,
        name=entry.name,
        software_primaryPurpose=document.spdx.software_SoftwarePurpose.data,
        dataset_datasetType=[document.spdx.dataset_DatasetType.noAssertion],
        dataset_dataCollectionProcess=f"asked of {entry.said['name']}, route {entry.said['route']}",
        comment=_facts({name: entry.said[name] for name in ("signals", "requests")}),
        verifiedUsing=[_sha256(document, entry.said["recording"])],
        **size,
    )
    _licences(document, made, entry.ref, words.UNKNOWN)
    return made


def _dataset(document: Document, entry: Entry) -> Any:
    size = {} if entry.said["rows"] is None else {"dataset_datasetSize": entry.said["rows"]}
    made = document.make(
        "dataset_DatasetPackage",
        entry.ref,
        name=entry.name,
        software_primaryPurpose=document.spdx.software_SoftwarePurpose.data,
        dataset_datasetType=[document.spdx.dataset_DatasetType.noAssertion],
        comment=_facts(entry.said),
        **size,
    )
    _licences(document, made, entry.ref, entry.said["licence"])
    return made


def _licences(document: Document, package: Any, name: str, said: str) -> None:
    declared: Any = NO_ASSERTION
    if words.is_known(said):
        # a licence that the passport names freely becomes a LicenseRef, which every SPDX reader can parse
        is_expression = re.fullmatch(r"[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+-]+)*", said) is not None
        expression = (
            said if is_expression else "LicenseRef-" + (re.sub(r"[^A-Za-z0-9.-]+", "-", said).strip("-") or "unnamed")
        )
        declared = document.make(
            "simplelicensing_LicenseExpression",
            f"licence-{name}",
            simplelicensing_licenseExpression=expression,
            comment=f"as the passport names it: {said}",
        )
    document.relate(f"declared-{name}", package, "hasDeclaredLicense", [declared])
    document.relate(f"concluded-{name}", package, "hasConcludedLicense", [NO_ASSERTION])


def _sha256(document: Document, digest: str) -> Any:
    return document.spdx.Hash(algorithm=document.spdx.HashAlgorithm.sha256, hashValue=digest)


def _facts(said: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in sorted(words.facts(said).items()))


def _written(document: Document) -> dict[str, Any]:
    """JSON-LD with its graph in order; read again by the library, which is what makes it valid."""
    spdx = document.spdx
    try:
        found = spdx.JSONLDSerializer().serialize_data(spdx.SHACLObjectSet(document.objects), force_at_graph=True)
        found["@graph"].sort(key=lambda one: str(one.get("spdxId") or one.get("@id")))
        spdx.JSONLDDeserializer().read(io.BytesIO(json.dumps(found).encode()), spdx.SHACLObjectSet())
    except (ValueError, TypeError, KeyError) as error:
        raise CheckError(f"this passport makes no valid SPDX 3.0.1: {str(error)[:300]}.") from None
    return found


def _library() -> Any:
    try:
        from spdx_python_model import v3_0_1
    except ImportError:
        raise missing_extra("spdx-python-model", "bom") from None
    return v3_0_1

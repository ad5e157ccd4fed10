"""What a passport may say: every field, none besides. docs and validators read it as JSON Schema 2020-12.

A field that is not known is null or 'unknown', never left out: what is missing is said openly. Readers refuse a
version that they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from stillroom.provenance.policy_schema import (
    STRICT,
    AccessPart,
    Count,
    Date,
    DecodePart,
    ParentPart,
    PolicyPart,
    Sha256,
    TermsPart,
)

VERSION = "stillroom-passport/1"
FILE = "passport.schema.json"
MOST_PROBLEMS = 20


class FileDigest(BaseModel):
    """A file and what it was."""

    model_config = STRICT
    path: str = Field(description="inside the run folder, with /")
    sha256: Sha256
    bytes: Count


class Interval(BaseModel):
    """A number and its 95 % interval; low = high = value for an exact one."""

    model_config = STRICT
    value: float
    low: float
    high: float


class StudentPart(BaseModel):
    """The student that is shipped: the first seed's."""

    model_config = STRICT
    name: str
    init: Literal["random", "pretrained", "teacher-weights", "unknown"]
    init_from: str | None = Field(description="whose weights it began with; null for random or unknown")
    licence: str
    factory: str | None = Field(description="the function that builds the network")
    answers: str
    classes: list[str] | None
    parameters: Count | None
    content_digest: Sha256 | None = Field(description="sha256 over sorted name, dtype, shape, bytes of every tensor")
    artifacts: list[FileDigest]


class SeedPart(BaseModel):
    """One training: the same student with another seed, or the control that never saw the teacher."""

    model_config = STRICT
    path: str
    seed: int | None
    content_digest: Sha256 | None
    teacher: str | None = Field(description="the teacher's name; null for a student trained alone")
    steps: Count | None
    seconds: float | None


class Member(BaseModel):
    """A member of an ensemble."""

    model_config = STRICT
    name: str
    kind: str
    digest: str | None
    licence: str
    route: str
    source: str
    revision: str | None
    access: AccessPart
    terms: TermsPart
    decode: DecodePart | None = Field(description="null where nothing was drawn")
    parts: list[Member]


class TeacherPart(BaseModel):
    """Who answered, what was kept of its answers, how many were asked for."""

    model_config = STRICT
    name: str
    kind: str
    digest: str | None
    licence: str
    route: str = Field(description="local-weights, own-account, published-outputs or unknown")
    source: str
    revision: str | None
    access: AccessPart
    terms: TermsPart
    decode: DecodePart | None = Field(description="null where nothing was drawn")
    parts: list[Member]
    signals: list[str] | None = Field(description="what was kept, such as TopK(k=64); null when it was asked live")
    recording: Sha256 | None = Field(description="sha256 of recording/manifest.json; null when it was asked live")
    requests: Count | None = Field(description="answers in the recording: examples times views")


class DataPart(BaseModel):
    """Examples that the student learned from, or was measured on."""

    model_config = STRICT
    role: Literal["training", "recorded", "control", "evaluation"]
    name: str
    digest: str | None = Field(description="sha256 over (id, fingerprint of the inputs)")
    labels_digest: str | None
    rows: Count | None
    labelled: Count | None
    licence: str
    source: str
    generated_by: str | None = Field(description="the model that wrote the data; null when none did, or nobody says")
    generated_from: Date | None
    generated_to: Date | None


class RunPart(BaseModel):
    """What a second run must share with this one, and how far it was shown to give the same (reproduce)."""

    model_config = STRICT
    recipe_sha256_canonical: Sha256 | None = Field(description="of the resolved recipe as canonical JSON (RFC 8785)")
    seeds: list[int]
    threads: Count | None
    deterministic: bool | None
    order_sha256: list[Sha256] | None = Field(description="of the order of the examples, one per seed")
    loss_sha256: list[Sha256] | None = Field(description="of the loss curve, one per seed")
    level: Literal["R0", "R1", "R2", "R3"] | None


class MethodPart(BaseModel):
    """What the student was asked to match, and how it was trained."""

    model_config = STRICT
    objective: JsonValue
    plan: JsonValue


class EnvironmentPart(BaseModel):
    """Where the student was trained; nothing that names a person or a machine."""

    model_config = STRICT
    python: str
    packages: dict[str, str]
    platform: str
    processor: str
    cpu_capability: str
    threads: Count | None
    accelerator: str | None
    variables: dict[str, str]
    lock_sha256: Sha256 | None = Field(description="of the installed packages and their versions")
    git: str | None = Field(description="the commit of the user's own code")
    dirty_sha256: Sha256 | None = Field(description="of what differs from that commit; null when nothing does")


class ComparisonPart(BaseModel):
    """How much better the first is in this metric: positive is better, whichever way the metric goes."""

    model_config = STRICT
    better: str
    worse: str
    metric: str
    difference: float
    low: float
    high: float
    seeds: Count


class EvaluationPart(BaseModel):
    """The scoreboard, without its figures."""

    model_config = STRICT
    metric: str
    examples: Count | None
    rows: dict[str, dict[str, Interval | None]]
    comparisons: list[ComparisonPart]
    diagnosis: list[str]


class QualityPart(BaseModel):
    """The task's quality of a shipped file, beside the student's own."""

    model_config = STRICT
    metric: str
    value: float
    low: float
    high: float
    student: Interval | None


class ExportPart(BaseModel):
    """A shipped file as it answered in its own runtime; one that failed is listed with passed = false."""

    model_config = STRICT
    target: str
    precision: str
    path: str
    sha256: Sha256
    bytes: Count
    passed: bool | None = Field(description="null: converted on a machine that cannot run it")
    examples: Count | None
    largest_difference: float | None
    agreement: float | None
    quality: QualityPart | None
    mean_difference: float | None
    latency_seconds: float | None = Field(description="median of one answer at batch 1, one thread")
    memory_bytes: Count | None = Field(description="the most that one answer takes in its runtime")
    quantisation: str | None = Field(description="how it was rounded, where there was a choice")
    versions: dict[str, str] | None = Field(description="of what wrote it and what it was measured in")


class Passport(BaseModel):
    """What a student learned from, as far as the files of its run say."""

    model_config = ConfigDict(extra="forbid", title=VERSION)
    schema_: Literal["stillroom-passport/1"] = Field(alias="schema")
    written_by: str
    created: str = Field(
        pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="when the newest file it is built from was written"
    )
    name: str
    student: StudentPart
    teachers: list[TeacherPart]
    data: list[DataPart]
    method: MethodPart
    recipe: JsonValue = Field(description="resolved; null when the run was made without one")
    recipe_sha256: Sha256 | None = Field(description="of recipe.yaml")
    seeds: list[SeedPart]
    run: RunPart
    environment: EnvironmentPart
    evaluation: EvaluationPart | None
    exports: list[ExportPart]
    policy: PolicyPart
    parents: list[ParentPart] = Field(description="teachers that were distilled themselves, with their own passports")
    built_from: list[FileDigest] = Field(description="the stages' files that this passport was read from")


def generated() -> dict[str, Any]:
    """The JSON Schema of the models above; passport.schema.json is this, and a test compares them."""
    schema = Passport.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@cache
def validator() -> Draft202012Validator:
    """The validator of the schema that is shipped with the library."""
    text = (resources.files("stillroom.provenance") / FILE).read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(text))


def validate(passport: Mapping[str, Any] | Any) -> list[str]:
    """What is wrong with a passport, a line for each problem: the field and what was found. Empty when it is valid."""
    found = []
    for error in validator().iter_errors(passport):
        place = ".".join(str(part) for part in error.absolute_path) or "passport"
        message = error.message if len(error.message) <= 160 else f"{error.message[:100]} ... {error.message[-50:]}"
        found.append(f"{place}: {message}")
        if len(found) == MOST_PROBLEMS:
            break
    return sorted(found)

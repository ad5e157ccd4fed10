"""What a passport says of terms: how a teacher was reached, under which terms, what the gate decided, and parents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

STRICT = ConfigDict(extra="forbid")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$", description="year-month-day")]
OutputUse = Literal["permitted", "conditional", "forbidden", "unknown"]
Outcome = Literal["allow", "conditions", "forbidden", "human"]


class AccessPart(BaseModel):
    """How a teacher was reached. What nobody declared is null or 'unknown'."""

    model_config = STRICT
    route: str = Field(description="local-weights, own-account, published-outputs or unknown")
    account: str | None = Field(description="whose account, as declared: an organisation or a digest, never a key")
    requests: Count | None = Field(description="answers that were asked for")
    tokens: Count | None
    evasion_declared_none: bool | None = Field(
        description="true: declared that no limit of the provider was evaded (accounts, proxies, jailbreaks)"
    )
    reasoning_traces: Literal["not-used", "published", "api-visible", "unknown"]


class TermsPart(BaseModel):
    """The terms that a teacher's outputs came under, and who settled it."""

    model_config = STRICT
    id: str = Field(description="a row of the terms table (SPDX id, LicenseRef, terms:provider-date), or unknown")
    output_use: OutputUse = Field(description="whether its outputs may train another model")
    text_sha256: Sha256 | None = Field(description="of the text as the user had it; kept as terms/SHA256.txt")
    in_force: Date | None = Field(description="the day on which these terms held for these outputs, as declared")
    decided_by: Literal["table", "human", "nobody"]
    table_version: str | None


class DecodePart(BaseModel):
    """How a teacher's texts were drawn."""

    model_config = STRICT
    temperature: float | None
    top_p: float | None
    seed: int | None


class ReasonPart(BaseModel):
    """One thing that the decision rests on."""

    model_config = STRICT
    about: str = Field(description="teacher, teacher.NAME, data.ROLE, student or a parent's name")
    terms: str
    condition: str | None
    says: str
    outcome: Outcome


class ObligationPart(BaseModel):
    """What the student's folder must carry."""

    model_config = STRICT
    id: str = Field(description="name-prefix, notice, terms-copy, use-restrictions or attribution")
    value: JsonValue
    from_teacher: str
    terms: str
    done: bool


class WaiverPart(BaseModel):
    """A signed statement of somebody who answers for what the table does not allow by itself."""

    model_config = STRICT
    sha256: Sha256 = Field(description="of the waiver's file, kept as terms/waiver-SHA256.json")
    who: str
    why: str
    until: Date
    covers: list[str]
    signer: Sha256 = Field(description="of the public key whose signature holds, kept as terms/signer-SHA256.pem")


class PolicyPart(BaseModel):
    """What the gate decided before the teacher was asked; not-asked when it never ran."""

    model_config = STRICT
    decision: Literal["allow", "conditions", "forbidden", "human", "not-asked"]
    reasons: list[ReasonPart]
    obligations: list[ObligationPart]
    waivers: list[WaiverPart]
    table_version: str | None


class ParentPart(BaseModel):
    """A teacher that is a student itself: its own passport lies in this run's folder."""

    model_config = STRICT
    name: str
    passport_sha256: Sha256
    path: str = Field(description="parents/SHA256.json")

"""The key ``terms:`` of a recipe: what whoever runs it declares about sources, purpose and access."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True)
Route = Literal["local-weights", "own-account", "published-outputs"]


class SourceTerms(BaseModel):
    """What is declared of one teacher, or of the weights that the student begins with."""

    model_config = STRICT
    licence: str | None = Field(None, description="an SPDX id, a licence tag of a hub, or 'own' for your own work")
    id: str | None = Field(None, description="a row of the terms table: stillroom terms list")
    text: str | None = Field(None, description="your copy of the terms: a file, or package:NAME/inner/file")
    route: Route | None = None
    account: str | None = Field(None, description="whose account asks: an organisation, never a key")
    requests: int | None = Field(None, ge=0, description="the most answers that may be asked for")
    in_force: date | None = Field(None, description="the day on which these terms held for these outputs")


class DataTerms(SourceTerms):
    """What is declared of the rows that the student learns from."""

    generated_by: str | None = Field(None, description="the model that wrote the data; 'unknown' where one did")
    generated_from: date | None = None
    generated_to: date | None = None


class Terms(BaseModel):
    """Facts that the gate asks for. What is left out is not known, and never becomes allowed by itself."""

    model_config = STRICT
    teacher: SourceTerms = SourceTerms()
    members: dict[str, SourceTerms] = Field(default_factory=dict, description="of an ensemble, by their names in it")
    data: DataTerms = DataTerms()
    student: SourceTerms = Field(SourceTerms(), description="of the weights that the student begins with")
    student_name: str | None = Field(None, description="what the student is called when it goes out; default: name")
    purpose: Literal["research", "commercial"] | None = None
    distributed: bool | None = Field(None, description="whether the student goes to anybody else; null counts as true")
    competing: bool | None = Field(None, description="whether it competes with the provider of a teacher")
    met: list[str] = Field([], description="conditions of the terms that you declare to be met, such as user-cap")
    evasion: Literal["none"] | None = Field(
        None, description="none: no limit of a provider was evaded (accounts, proxies, jailbreaks)"
    )
    reasoning_traces: Literal["not-used", "published", "api-visible"] | None = Field(
        None, description="withheld reasoning was not extracted; where reasoning was used, how it was to be seen"
    )
    waivers: list[str] = Field([], description="signed waivers: stillroom terms waive")
    signers: list[str] = Field([], description="public keys (PEM) of those whose waivers count")
    table: str | None = Field(None, description="rows of your own: stillroom terms add")

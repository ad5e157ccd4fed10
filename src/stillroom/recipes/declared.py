"""The key ``terms:`` of a recipe: what whoever runs it declares about sources, purpose and access."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True)
Route = Literal["local-weights", "own-account", "published-outputs"]


class SourceTerms(BaseModel):
    """What is declared of one teacher, or of the weights that the student begins with."""

    model_config = STRICT
    licence: str | None = Field(default=None, description="an SPDX id, a hub's licence tag, or 'own' for your own work")
    id: str | None = Field(default=None, description="a row of the terms table: stillroom terms list")
    text: str | None = Field(default=None, description="your copy of the terms: a file, or package:NAME/inner/file")
    route: Route | None = None
    account: str | None = Field(default=None, description="whose account asks: an organisation, never a key")
    requests: int | None = Field(default=None, ge=0, description="the most answers that may be asked for")
    in_force: date | None = Field(default=None, description="the day on which these terms held for these outputs")


class DataTerms(SourceTerms):
    """What is declared of the rows that the student learns from."""

    generated_by: str | None = Field(default=None, description="the model that wrote the data; 'unknown' where one did")
    generated_from: date | None = None
    generated_to: date | None = None


class Terms(BaseModel):
    """Facts that the gate asks for. What is left out is not known, and never becomes allowed by itself."""

    model_config = STRICT
    teacher: SourceTerms = SourceTerms()
    members: dict[str, SourceTerms] = Field(default_factory=dict, description="of an ensemble, by their names in it")
    data: DataTerms = DataTerms()
    student: SourceTerms = Field(default=SourceTerms(), description="of the weights that the student begins with")
    student_name: str | None = Field(default=None, description="its name when it goes out; default: the recipe's")
    purpose: Literal["research", "commercial"] | None = None
    distributed: bool | None = Field(
        default=None, description="whether anybody else gets the student; null counts as true"
    )
    competing: bool | None = Field(default=None, description="whether it competes with the provider of a teacher")
    met: list[str] = Field(default=[], description="conditions of terms that you declare met, as user-cap")
    evasion: Literal["none"] | None = Field(
        default=None, description="none: no limit of a provider was evaded (accounts, proxies, jailbreaks)"
    )
    reasoning_traces: Literal["not-used", "published", "api-visible"] | None = Field(
        default=None,
        description="no withheld reasoning was extracted; how what was used was to be seen",
    )
    waivers: list[str] = Field(default=[], description="signed waivers: stillroom terms waive")
    signers: list[str] = Field(default=[], description="public keys (PEM) of those whose waivers count")
    table: str | None = Field(default=None, description="rows of your own: stillroom terms add")


def from_here(terms: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The declarations (plain JSON) with every file beside the recipe named from here, as the run's recipe.yaml is."""

    def named(name: str | None) -> str | None:
        return Path(os.path.relpath(folder / name)).as_posix() if name and (folder / name).is_file() else name

    def one(said: Mapping[str, Any]) -> dict[str, Any]:
        return {**said, "text": named(said["text"])}

    return {
        **terms,
        **{part: one(terms[part]) for part in ("teacher", "data", "student")},
        "members": {name: one(said) for name, said in terms["members"].items()},
        **{part: [named(name) for name in terms[part]] for part in ("waivers", "signers")},
        "table": named(terms["table"]),
    }

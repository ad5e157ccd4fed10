"""The terms table: one row per licence or provider's terms, as read on a day, with the clause and the text's sha256.

The rows are paraphrases with locators; the texts themselves are not here. The table is no legal advice.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from stillroom.errors import FolderError, UsageError, nearest
from stillroom.files import read_json, write_json

FORMAT = "stillroom-terms/1"
FILE = "terms.json"
SCHEMA = "terms.schema.json"
STRICT = ConfigDict(extra="forbid", frozen=True)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
Use = Literal["permitted", "conditional", "forbidden", "unknown"]
ConditionId = Literal[
    "name-prefix", "notice", "statement", "terms-copy", "use-restrictions", "attribution", "changes-stated",
    "non-commercial", "no-competing-model", "user-cap", "territory", "share-alike", "approval", "guardrails",
]  # fmt: skip


class Text(BaseModel):
    """A text that the row was read from, or a copy of it that is known."""

    model_config = STRICT
    sha256: Sha256 = Field(description="of the file, or of the text without white space around it (of says which)")
    words_sha256: Sha256 | None = Field(None, description="of its words joined by single spaces: any line breaks match")
    of: str
    seen: Date


class Condition(BaseModel):
    """One thing that must hold; ``scope``: where outputs were learned from, or weights were begun with."""

    model_config = STRICT
    id: ConditionId
    value: JsonValue = Field(None, description="the prefix, sentence, number or policy that it is about")
    says: str = Field(description="our paraphrase")
    locator: str = Field(description="the clause")
    check: Literal["auto", "declared", "human"] = Field(description="who can find out whether it holds")
    when: Literal["distributed", "always"]
    scope: list[Literal["outputs", "weights"]] = Field(["outputs", "weights"], min_length=1)


class Row(BaseModel):
    """What one licence, or one provider's terms, say about training another model."""

    model_config = STRICT
    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_-]*$", description="SPDX id, LicenseRef-, terms:provider-date")
    title: str
    kind: Literal["licence", "model-licence", "provider-terms", "own"]
    aliases: list[str] = Field([], description="other ids of the same terms, such as the hub's licence tags")
    applies_to: list[str] = Field([], description="models' names, with * and ?: where a name alone is known")
    output_use: Use = Field(description="whether outputs (answers, logits, texts, data) may train another model")
    weights_use: Use = Field(description="whether a student may begin with the weights")
    says: str = Field(description="our paraphrase of what decides output_use")
    locator: str = Field(description="the clause; empty where the terms do not speak of it")
    conditions: list[Condition] = []
    inherits: bool = Field(False, description="true: a student counts as a derivative, and so do its own students")
    spares_own: bool = Field(False, description="true: output_use does not bind students made of the same weights")
    texts: list[Text] = []
    source: str = Field(description="where the text is published")
    decided_by: str
    read_by: str | None = Field(description="who read the primary text; null when nobody here did")
    confidence: Literal["primary", "secondary"]

    @model_validator(mode="after")
    def _read(self) -> Row:
        if self.confidence == "primary" and self.kind != "own" and not (self.texts and self.read_by):
            raise ValueError(f"row {self.id!r} is called primary, but no text that was read is named")
        return self


class File(BaseModel):
    """terms.json, or a user's own table beside a recipe."""

    model_config = ConfigDict(extra="forbid", title=FORMAT)
    format: Literal["stillroom-terms/1"]
    version: str = Field(description="a day, and a letter where there were several")
    rows: list[Row]


@dataclass(frozen=True)
class Table:
    """All rows, with the package's version and, after a +, that of the user's own table."""

    version: str
    rows: Mapping[str, Row]
    own: frozenset[str] = frozenset()  # ids of the rows that the user added

    def find(self, licence: str) -> tuple[Row, ...]:
        """The rows of a licence, by id or alias; of an expression (A AND B, A OR B) all of them, the strictest reading.

        Empty when any part of it has no row.
        """
        found = [self._one(part) for part in re.split(r"\s+(?:AND|OR)\s+", licence.strip("() "))]
        return tuple(row for row in found if row) if all(found) else ()

    def _one(self, licence: str) -> Row | None:
        wanted = licence.strip("() ").casefold().removeprefix("licenseref-").removeprefix("scancode-")
        for row in self.rows.values():
            names = (row.id.casefold().removeprefix("licenseref-").removeprefix("scancode-"), *row.aliases)
            if wanted in (name.casefold() for name in names):
                return row
        return None

    def named(self, model: str) -> tuple[Row, ...]:
        """The rows whose ``applies_to`` fits a model's name (with or without its organisation), best known first."""
        names = {model.casefold(), model.casefold().rpartition("/")[2]}
        return tuple(
            row
            for row in self.rows.values()
            if any(fnmatch.fnmatchcase(name, glob.casefold()) for glob in row.applies_to for name in names)
        )

    def of_text(self, sha256: str, words: str | None) -> Row | None:
        """The row that was read from this very text, or from its words."""
        for row in self.rows.values():
            if any(sha256 == text.sha256 or (words and words == text.words_sha256) for text in row.texts):
                return row
        return None

    def get(self, name: str) -> Row:
        """A row by id or alias. Raises UsageError with the nearest id."""
        row = self._one(name)
        if row is None:
            known = [each for one in self.rows.values() for each in (one.id, *one.aliases)]
            meant = nearest(name, known)
            meant = meant if meant.startswith("; did you") else ". See: stillroom terms list"
            raise UsageError(f"the terms table has no row {name!r}{meant}")
        return row


def load_table(own: Path | None = None) -> Table:
    """The package's table and, where given, the user's own beside it.

    Raises UsageError for a file that is no terms table, or one whose row has the id or an alias of another: rows are
    added, never replaced.
    """
    shipped = _shipped()
    rows = {row.id: row for row in shipped.rows}
    if own is None:
        return Table(shipped.version, rows)
    added = read_own(own)
    known = {name.casefold() for row in shipped.rows for name in (row.id, *row.aliases)}
    for row in added.rows:
        taken = [name for name in (row.id, *row.aliases) if name.casefold() in known]
        if taken:
            raise UsageError(f"{own}: {taken[0]!r} is in the table already. Give your row an id of its own.")
        known |= {name.casefold() for name in (row.id, *row.aliases)}
        rows[row.id] = row
    return Table(f"{shipped.version}+{added.version}", rows, frozenset(row.id for row in added.rows))


def read_own(path: Path) -> File:
    """A user's own table. Raises UsageError, with the field, when it is not one."""
    try:
        return File.model_validate(read_json(path))
    except FolderError as error:
        raise UsageError(str(error)) from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise UsageError(f"{path}: {place}: {problem['msg']}. See: stillroom terms show Apache-2.0") from None


def add_row(path: Path, row: Mapping[str, Any], today: str) -> Row:
    """Add a row to a user's own table, which is made where it is not. Raises UsageError as ``load_table`` does."""
    before = read_own(path).model_dump(mode="json")["rows"] if path.exists() else []
    content = {"format": FORMAT, "version": today, "rows": [*before, dict(row)]}
    candidate = path.with_name(path.name + ".tmp")
    write_json(candidate, content)
    try:
        table = load_table(candidate)
    except UsageError as error:
        raise UsageError(str(error).replace(str(candidate), str(path))) from None
    finally:
        candidate.unlink()
    write_json(path, content)
    return table.rows[str(row["id"])]


def generated() -> dict[str, Any]:
    """The JSON Schema of the table; terms.schema.json is this, and a test compares them."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **File.model_json_schema()}


def lines(table: Table) -> Iterator[tuple[str, str, str, str]]:
    """id, output_use, confidence and title of every row, for a listing."""
    for row in table.rows.values():
        yield row.id, row.output_use, row.confidence, row.title


@cache
def _shipped() -> File:
    text = (resources.files("stillroom.provenance.terms") / FILE).read_text(encoding="utf-8")
    return File.model_validate(json.loads(text))

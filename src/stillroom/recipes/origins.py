"""Where what a student learns from comes from, and under which terms: looked up from the recipe, nothing is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stillroom.data.table import Table as Rows
from stillroom.digests import file_digest
from stillroom.errors import UsageError
from stillroom.places import locate, locate_file, without_credentials
from stillroom.provenance.lineage import Lineage, lineage_of
from stillroom.provenance.terms import texts
from stillroom.provenance.terms.gate import Access, Source
from stillroom.provenance.terms.table import Row, Table
from stillroom.recipes.declared import DataTerms, SourceTerms, Terms
from stillroom.recipes.recipe import Recipe, Use
from stillroom.teachers.published.place import source_of
from stillroom.types import Identity

BEGIN_WITH = ("pretrained", "lora")  # students that begin with the weights at their ``model``


@dataclass
class Origins:
    """Sources as they are looked up, with the texts and passports found on the way."""

    terms: Terms
    base: Path
    table: Table
    identity: Callable[[Use], Identity]
    files: list[Path] = dataclasses.field(default_factory=list)
    lineages: list[Lineage] = dataclasses.field(default_factory=list)

    def teacher(self, use: Use, said: SourceTerms, place: str) -> list[Source]:
        """A teacher, its members, or its own teachers."""
        if use.use == "ensemble":
            members, of = use.arguments["members"], self.terms.members
            if unknown := sorted(set(of) - set(members)):
                raise UsageError(f"terms.members names {unknown[0]!r}; the members are {', '.join(sorted(members))}.")
            parts = enumerate(members.items())
            return [s for n, (name, one) in parts for s in self.teacher(Use(**one), of.get(name, said), f"{place}.{n}")]
        if use.use == "run":
            return self._student_of_a_run(str(use.arguments.get("run")), said, place)
        if use.use == "published":
            return self._published(use, said, place)
        if use.use == "endpoint":  # its model is at a server: nothing is looked up here
            return [self._source(place, "outputs", _at_server(use), said)]
        if use.arguments.get("model") is not None and ":" not in use.use:
            return [self._source(place, "outputs", _model_at(use, self.base), said)]
        file, _, function = use.use.rpartition(":")
        if file.endswith(".py") and (said.licence or said.id):  # a function of one's own is not run to hear its name
            return [self._source(place, "outputs", _Found(function, source=Path(file).name), said)]
        return self._identified(self.identity(use), said, place)

    def data(self, rows: Rows, said: DataTerms) -> list[Source]:
        """The rows that the student learns from, and the model that wrote them."""
        licence, about = said.licence or rows.licence, f"data {rows.name}"
        known = {"rows": self.table.find(licence), "origin": rows.source, "declared": said.licence is not None}
        found = [Source("data.training", about, rows.name, "data", licence, text=self._text([], said)[1], **known)]
        if said.generated_by is not None:
            writer = _Found(said.generated_by, route="published-outputs")
            of = said.model_copy(update={"licence": None, "text": None})
            found.append(self._source("data.training.writer", "outputs", writer, of, "writer of the data"))
        return found

    def start(self, recipe: Recipe, taught: list[Source]) -> list[Source]:
        """The weights that the student begins with: its teacher's, another model's, or none."""
        use, said = recipe.student, self.terms.student
        if recipe.writes is not None and recipe.writes.base is not None and use.use == "pruned":
            base = Use(**{"use": "pretrained", "model": recipe.writes.base})
            return [self._source("student", "weights", _model_at(base, self.base), said)]
        if recipe.tokens is not None and use.use == "pruned":
            return [
                dataclasses.replace(s, place="student", about=f"weights of {s.name}", role="weights") for s in taught
            ]
        if recipe.speaks and use.use in BEGIN_WITH:
            return [self._source("student", "weights", _model_at(use, self.base), said)]
        if said.licence or said.id:
            return [self._source("student", "weights", _Found(recipe.name), said)]
        return []

    def _identified(self, who: Identity, said: SourceTerms, place: str) -> list[Source]:
        """A teacher as it introduces itself; of an ensemble its members."""
        if who.parts:
            return [s for n, part in enumerate(who.parts) for s in self._identified(part, said, f"{place}.{n}")]
        found = _Found(who.name, who.licence, who.source, route=who.route)
        return [self._source(place, "outputs", found, said)]

    def _published(self, use: Use, said: SourceTerms, place: str) -> list[Source]:
        """Published answers under their card's licence, and the model that wrote them where the recipe names it."""
        found = source_of(str(use.arguments.get("path")), self.base, use.arguments.get("split"))
        beside = texts.texts_beside(found.folder) if found.folder else []
        if found.card is not None:
            self.files.append(found.card)
        licence = str(use.arguments.get("licence") or found.licence)
        about = _Found(found.name, licence, found.source, beside=beside, route="published-outputs")
        sources = [self._source(place, "outputs", about, said)]
        if use.arguments.get("by"):
            writer = _Found(str(use.arguments["by"]), route="published-outputs")
            of = said.model_copy(update={"licence": None, "text": None})
            sources.append(self._source(f"{place}.writer", "outputs", writer, of, "writer of the answers"))
        return sources

    def _student_of_a_run(self, run: str, said: SourceTerms, place: str) -> list[Source]:
        """A student of another run: what its passport says of its own teachers holds here too."""
        lineage = lineage_of(run, self.base, self.table)
        if lineage is None:  # without a passport nobody knows what it learned from, whatever its own licence
            without = _Found(f"run {Path(run).name}, which has no passport")
            return [self._source(place, "outputs", without, SourceTerms())]
        self.lineages.append(lineage)
        own = _Found(lineage.name, lineage.passport["student"]["licence"], f"run {Path(run).name}")
        return [self._source(place, "outputs", own, said), *lineage.sources]

    def _source(self, place: str, role: Any, found: _Found, said: SourceTerms, kind: str | None = None) -> Source:
        """A source with every row that its declared id, its licence, its text and its names lead to."""
        text, sha256 = self._text(found.beside, said)
        licence = said.licence or found.licence
        rows: list[Row | None] = [self.table.get(said.id)] if said.id else []
        rows += [*self.table.find(licence), texts.row_of(text, self.table) if text is not None else None]
        names = dict.fromkeys((found.name, found.title or found.name, found.source.removeprefix("hf:")))
        rows += [row for name in names for row in self.table.named(name)]
        strange = said.licence is not None and not said.id and not self.table.find(said.licence)
        access = Access(
            route=said.route or found.route,
            account=said.account,
            requests=said.requests,
            evasion_none=True if self.terms.evasion == "none" else None,
            reasoning_traces=self.terms.reasoning_traces or "unknown",
        )
        kind = kind or ("teacher" if role == "outputs" else "weights of")
        return Source(
            place, f"{kind} {found.name}", found.name, role, licence,
            rows=() if strange else tuple({row.id: row for row in rows if row}.values()),
            access=access,
            origin=found.source,
            text=sha256,
            in_force=said.in_force.isoformat() if said.in_force else None,
            declared=bool(said.licence or said.id),
        )  # fmt: skip

    def _text(self, beside: list[Path], said: SourceTerms) -> tuple[Path | None, str | None]:
        """The text of the terms as the user has it, and its sha256; all texts found are kept in the run."""
        paths = [texts.named_text(said.text, self.base)] if said.text else beside
        self.files.extend(paths)
        text = texts.chosen(paths, self.table)
        return text, file_digest(text) if text is not None else None


@dataclass(frozen=True)
class _Found:
    """What is known of a source without a declaration."""

    name: str
    licence: str = "unknown"
    source: str = "unknown"
    title: str | None = None  # of the package or folder that it lies in
    beside: list[Path] = dataclasses.field(default_factory=list)
    route: str = "local-weights"


def _model_at(use: Use, base: Path) -> _Found:
    """A model at a hub, in a folder or in a package, without loading it."""
    model, gguf = str(use.arguments["model"]), use.arguments.get("gguf")
    if model.endswith(".onnx"):
        path, place = locate_file(model, base)
        package = place.title if model.startswith("package:") else None
        name, licence = (
            str(use.arguments.get(k) or found) for k, found in (("name", path.stem), ("licence", place.licence))
        )
        return _Found(name, licence, place.source, place.title, texts.texts_beside(path.parent, package))
    if model.endswith(".gguf") and gguf is None:
        model, _, gguf = model.rpartition("/")
    place = locate(model or ".")
    package = place.title if model.startswith("package:") else None
    beside = texts.texts_beside(Path(place.name), package) if place.local else []
    licence = str(use.arguments.get("licence") or place.licence)
    return _Found(Path(gguf).stem if gguf else place.title, licence, place.source, place.title, beside)


def _at_server(use: Use) -> _Found:
    """A model behind an address: its name, the server's, and nothing that is not declared."""
    said = use.arguments
    host = str(said.get("name") or urlsplit(without_credentials(str(said.get("url", "")))).hostname or "unknown")
    return _Found(str(said.get("model")), str(said.get("licence") or "unknown"), host, route="own-account")

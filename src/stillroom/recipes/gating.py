"""From a recipe to the gate's question, and from its answer to policy.json: before anything is asked or trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from stillroom.data.table import Table as Rows
from stillroom.errors import ConditionsError, ForbiddenError, StillroomError, UndecidedError, UsageError
from stillroom.files import read_json, write_json
from stillroom.provenance.lineage import Lineage, keep_parents
from stillroom.provenance.policy import POLICY, described
from stillroom.provenance.terms import texts
from stillroom.provenance.terms.gate import Decision, Facts, Source, decide
from stillroom.provenance.terms.table import Table, load_table
from stillroom.provenance.terms.waivers import Waiver, read_waiver
from stillroom.recipes.declared import Terms
from stillroom.recipes.origins import Origins
from stillroom.recipes.recipe import Recipe, Use
from stillroom.types import Identity

ERRORS: dict[str, type[StillroomError]] = {
    "conditions": ConditionsError,
    "human": UndecidedError,
    "forbidden": ForbiddenError,
}
SAYS = {
    "allow": "allowed, with what is declared",
    "conditions": "conditions of the terms are not met",
    "human": "a person must decide what the terms allow",
    "forbidden": "the terms forbid it",
}
MOST_SAID = 4  # reasons in an error; `stillroom gate` shows all


@dataclass(frozen=True)
class Question:
    """Everything that the gate looks at, and the user's copies of the terms."""

    sources: tuple[Source, ...]
    facts: Facts
    table: Table
    files: tuple[Path, ...] = ()  # texts to keep in the run
    lineages: tuple[Lineage, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def decide(self) -> Decision:
        """The gate's answer."""
        covered = [cover for waiver in self.waivers for cover in waiver.covers]
        carried = [reason for lineage in self.lineages for reason in lineage.carried]
        return decide(self.sources, self.facts, covered, carried)


def question(
    recipe: Recipe, base: Path, rows: Rows, identity: Callable[[Use], Identity], today: date | None = None
) -> Question:
    """What the gate is asked about a recipe.

    ``rows``: what the student learns from; ``identity``: who a teacher is, built only where the recipe alone does not
    say. Raises UsageError for a waiver, table or id that does not hold, MissingFileError for a file that is not there.
    """
    said = recipe.terms
    looked = Origins(said, base, load_table(_file(base, said.table)), identity)
    taught = looked.teacher(recipe.teacher, said.teacher, "teacher")
    learned = looked.data(rows, said.data)
    begun = looked.start(recipe, taught)
    known = {condition.id for row in looked.table.rows.values() for condition in row.conditions}
    if unknown := sorted(set(said.met) - known):
        raise UsageError(f"terms.met: there is no condition {unknown[0]!r}; known: {', '.join(sorted(known))}.")
    signers = [_needed(base, signer, "terms.signers") for signer in said.signers]
    day = today or datetime.now(UTC).date()
    waivers = tuple(read_waiver(_needed(base, w, "terms.waivers"), signers, day) for w in said.waivers)
    facts = Facts(said.student_name or recipe.name, said.purpose, said.distributed, said.competing, frozenset(said.met))
    written = {n: str(v) for n in ("generated_from", "generated_to") if (v := getattr(said.data, n)) is not None}
    return Question(
        (*taught, *learned, *begun),
        facts,
        looked.table,
        tuple(dict.fromkeys(looked.files)),
        tuple(looked.lineages),
        waivers,
        {"generated_by": said.data.generated_by, **written},
    )


def pass_gate(asked: Question, folder: Path | None, recipe: str = "RECIPE") -> Decision:
    """The decision when it is 'allow'; policy.json, texts, waivers and parents' passports are kept in ``folder``.

    Raises ConditionsError (exit code 3), ForbiddenError (4) or UndecidedError (5) with the reasons otherwise.
    """
    decision = asked.decide()
    if decision.outcome != "allow":
        raise refusal(decision, asked, recipe)
    if folder is not None:
        for path in asked.files:
            texts.keep(path, folder)
        for waiver in asked.waivers:
            (folder / texts.FOLDER).mkdir(parents=True, exist_ok=True)
            (folder / texts.FOLDER / f"waiver-{waiver.sha256}.json").write_bytes(waiver.path.read_bytes())
            (folder / texts.FOLDER / f"signer-{waiver.signer.id}.pem").write_bytes(waiver.signer.pem)
        parents = [entry for lineage in asked.lineages for entry in keep_parents(lineage, folder)]
        _write(folder / POLICY, described(asked.sources, asked.facts, asked.table.version, decision, parents) | {
            "waivers": [
                {part: getattr(w, part) for part in ("sha256", "who", "why", "until")}
                | {"covers": list(w.covers), "signer": w.signer.id}
                for w in asked.waivers
            ],
            "data": dict(asked.data),
        })  # fmt: skip
    return decision


def answer(asked: Question) -> tuple[list[str], int]:
    """The decision in lines for people, and the exit code."""
    decision = asked.decide()
    code = ERRORS[decision.outcome].exit_code if decision.outcome in ERRORS else 0
    lines = [f"{decision.outcome.upper()}: {SAYS[decision.outcome]} (terms table {asked.table.version})"]
    covered = {cover: waiver.who for waiver in asked.waivers for cover in waiver.covers}
    for reason in (*decision.open(), *(r for r in decision.reasons if r.outcome == "allow")):
        by = f" Waived by {covered[reason.key]}." if reason.key in covered and reason.outcome != "allow" else ""
        lines.append(f"  {reason.outcome:<11}{reason.key}: {reason.says}{by}")
    if decision.obligations:
        lines.append("The student must carry:")
    lines += [f"  {o.id:<17}{o.value}  (from {o.from_teacher}, {o.terms})" for o in decision.obligations]
    return lines, code


def refusal(decision: Decision, asked: Question, recipe: str) -> StillroomError:
    """The error of a decision that is not 'allow'."""
    covered = {cover for waiver in asked.waivers for cover in waiver.covers}
    found = [reason for reason in decision.open() if reason.key not in covered]
    shown = "; ".join(f"{reason.key}: {reason.says}" for reason in found[:MOST_SAID])
    more = f" And {len(found) - MOST_SAID} more." if len(found) > MOST_SAID else ""
    return ERRORS[decision.outcome](f"{SAYS[decision.outcome]}: {shown}{more} See: stillroom gate {recipe}")


def check_requests(terms: Terms, count: int) -> None:
    """Refuse to ask for more answers than the recipe declares that the account may ask for (UsageError)."""
    most = terms.teacher.requests
    if most is not None and count > most:
        raise UsageError(f"{count} answers would be asked for, and terms.teacher.requests allows {most}.")


def _write(path: Path, policy: dict[str, Any]) -> None:
    """Anew only where something changed: a passport's day is that of the files it is built from."""
    if not path.is_file() or read_json(path) != policy:
        write_json(path, policy)


def _file(base: Path, name: str | None) -> Path | None:
    return None if name is None else _needed(base, name, "terms")


def _needed(base: Path, name: str, what: str) -> Path:
    """A file that a recipe names: beside it, or from here, as its own files are."""
    for path in (base / name, Path(name)):
        if path.is_file():
            return path
    raise UsageError(f"{what}: there is no file {name}, beside the recipe or here.")

"""The gate: may this student learn from these sources, under what conditions? A pure function of what is declared.

Outcomes from best to worst: allow, conditions (unmet ones can be met), human (somebody must decide), forbidden. The
worst of all reasons wins, so the order of sources does not matter, one more teacher or data set never makes it better,
and what is not known never becomes allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stillroom.provenance.terms.table import Condition, Row

Outcome = Literal["allow", "conditions", "human", "forbidden"]
OUTCOMES: tuple[Outcome, ...] = ("allow", "conditions", "human", "forbidden")
# What binds a purpose binds it at any distance; names and notices bind only whoever the terms call a licensee.
ABOUT_PURPOSE = ("non-commercial", "no-competing-model", "user-cap", "territory", "approval", "guardrails")
NOT_LOCAL = ("own-account", "published-outputs")


@dataclass(frozen=True)
class Access:
    """How a teacher was reached, as declared. None and 'unknown': nobody said."""

    route: str = "unknown"  # local-weights | own-account | published-outputs | unknown
    account: str | None = None
    requests: int | None = None
    tokens: int | None = None
    evasion_none: bool | None = None
    reasoning_traces: Literal["not-used", "published", "api-visible", "unknown"] = "unknown"


@dataclass(frozen=True)
class Source:
    """One thing that a student learns from: a teacher, a member, a parent's teacher, data, or its first weights."""

    place: str  # where the passport says it: teacher, teacher.NAME, data.training, student
    about: str  # for people: 'teacher gpt-4o'
    name: str
    role: Literal["outputs", "weights", "data"]
    licence: str
    rows: tuple[Row, ...] = ()  # of the terms table; every one counts
    access: Access = Access(route="local-weights")
    origin: str = "unknown"  # its source in the words of its identity
    text: str | None = None  # sha256 of the licence's text as the user has it
    in_force: str | None = None
    declared: bool = False  # a person named the terms
    inherited: bool = False  # it taught a teacher


@dataclass(frozen=True)
class Facts:
    """What the recipe declares about the student. None: not declared."""

    student_name: str
    purpose: Literal["research", "commercial"] | None = None
    distributed: bool | None = None
    competing: bool | None = None
    met: frozenset[str] = frozenset()  # condition ids that the person who runs this says are met


@dataclass(frozen=True)
class Reason:
    """One thing that the decision rests on."""

    about: str
    terms: str
    condition: str | None
    outcome: Outcome
    says: str

    @property
    def key(self) -> str:
        """What a waiver names to cover it."""
        return key_of(self.about, self.terms, self.condition)


def key_of(about: str, terms: str, condition: str | None) -> str:
    """A reason as `stillroom gate` prints it and a waiver covers it."""
    return f"{about} / {terms} / {condition or 'use'}"


@dataclass(frozen=True)
class Obligation:
    """What the student's folder must carry."""

    id: str
    value: Any
    from_teacher: str
    terms: str


@dataclass(frozen=True)
class Decision:
    """The worst outcome, every reason, and what the student must carry."""

    outcome: Outcome
    reasons: tuple[Reason, ...]
    obligations: tuple[Obligation, ...]

    def open(self) -> tuple[Reason, ...]:
        """The reasons that are not 'allow', worst first."""
        found = [reason for reason in self.reasons if reason.outcome != "allow"]
        return tuple(sorted(found, key=lambda reason: (-OUTCOMES.index(reason.outcome), reason.key)))


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst of them; allow for none."""
    return OUTCOMES[max((OUTCOMES.index(outcome) for outcome in outcomes), default=0)]


def decide(
    sources: Sequence[Source], facts: Facts, covered: Iterable[str] = (), carried: Iterable[Reason] = ()
) -> Decision:
    """The decision over all sources.

    ``covered``: the reasons' keys that a valid waiver takes upon itself; ``carried``: reasons of a teacher's own
    passport that no declaration here can settle (how its teachers were reached).
    """
    begun_with = {row.id for source in sources if source.role == "weights" for row in source.rows}
    reasons, waived = set(carried), set(covered)
    duties: set[tuple[str, str, str, str]] = set()
    for source in sources:
        reasons.update(_reasons(source, facts, begun_with))
        duties.update((o.id, str(o.value), o.from_teacher, o.terms) for o in _obligations(source, facts, waived))
    return Decision(
        worst(reason.outcome for reason in reasons if reason.key not in waived),
        tuple(sorted(reasons, key=lambda reason: (reason.key, reason.outcome, reason.says))),
        tuple(Obligation(*duty) for duty in sorted(duties)),
    )


def _reasons(source: Source, facts: Facts, begun_with: set[str]) -> Iterator[Reason]:
    if not source.rows:
        yield _without_row(source)
    for row in source.rows:
        yield _use(source, row, begun_with)
        for condition in _binding(source, row, facts):
            yield _condition(source, row, condition, facts)
        if row.kind == "provider-terms" and source.in_force is None:
            says = (
                "Terms change: declare the day on which these were in force for these outputs (in_force: 2026-01-31)."
            )
            yield Reason(source.about, row.id, "in-force", "human", says)
    if source.role == "outputs" and not (source.rows and all(row.kind == "own" for row in source.rows)):
        yield from _access(source)


def _without_row(source: Source) -> Reason:
    if source.role == "data" and source.licence == "unknown":
        says = "The licence of the data is unknown. Data of one's own does not stop a run; the passport says unknown."
        return Reason(source.about, "unknown", None, "allow", says)
    if source.licence == "unknown":
        says = "Its terms are unknown. Declare them in the recipe (terms), 'own' for work of your own."
    else:
        says = f"The terms table has no row for {source.licence!r}. Read its text and add a row: stillroom terms add."
    return Reason(source.about, "unknown", None, "human", says)


def _use(source: Source, row: Row, begun_with: set[str]) -> Reason:
    """Whether the terms let this be learned from at all."""
    use = row.weights_use if source.role == "weights" else row.output_use
    where = f" ({row.locator})" if row.locator else ""
    if row.confidence == "secondary":
        says = f"{row.says} This row rests on a secondary source only: read the terms, and decide."
        return Reason(source.about, row.id, None, "human", says)
    if use == "unknown":
        return Reason(source.about, row.id, None, "human", f"{row.says} What the terms allow is not known{where}.")
    if use == "forbidden" and not (row.spares_own and row.id in begun_with):
        return Reason(source.about, row.id, None, "forbidden", f"{row.says}{where}")
    return Reason(source.about, row.id, None, "allow", f"{row.says}{where}")


def _binding(source: Source, row: Row, facts: Facts) -> Iterator[Condition]:
    """The conditions that count here: of this scope, now, and at this distance."""
    scope = "weights" if source.role == "weights" else "outputs"
    for condition in row.conditions:
        far = source.inherited and not row.inherits and condition.id not in ABOUT_PURPOSE
        later = condition.when == "distributed" and facts.distributed is False
        if scope in condition.scope and not far and not later:
            yield condition


def _condition(source: Source, row: Row, condition: Condition, facts: Facts) -> Reason:
    outcome, what = _met(source, condition, facts)
    where = f" ({condition.locator})" if condition.locator else ""
    return Reason(source.about, row.id, condition.id, outcome, f"{condition.says}{where} {what}".rstrip())


def _met(source: Source, condition: Condition, facts: Facts) -> tuple[Outcome, str]:
    """Whether a condition holds, and what to do where it does not."""
    if condition.check == "human":
        return "human", "Only a person can say whether it holds."
    if condition.id == "name-prefix":
        if facts.student_name.startswith(str(condition.value)):
            return "allow", ""
        return "conditions", f"It is called {facts.student_name!r}: set terms.student_name to {condition.value}-..."
    if condition.id == "terms-copy" and source.text is None:
        return "conditions", "Their text was not found beside the model: name it (terms.teacher.text: path)."
    if condition.check == "auto":
        return "allow", "stillroom does it."
    if condition.id == "non-commercial":
        if facts.purpose is None:
            return "human", "Declare terms.purpose: research or commercial."
        return ("allow", "") if facts.purpose == "research" else ("forbidden", "The purpose is declared commercial.")
    if condition.id == "no-competing-model":
        if facts.competing is None:
            return "human", "Declare terms.competing: true or false; whether it competes is for a person to say."
        return ("forbidden", "It is declared to compete.") if facts.competing else ("allow", "Declared not to compete.")
    if condition.id in facts.met:
        return "allow", "Declared as met."
    return "human", f"Where it holds, declare it: terms.met: [{condition.id}]."


def _obligations(source: Source, facts: Facts, waived: set[str]) -> Iterator[Obligation]:
    for row in source.rows:
        for condition in _binding(source, row, facts):
            if condition.check == "auto" and key_of(source.about, row.id, condition.id) not in waived:
                yield Obligation(condition.id, _value(source, row, condition, facts), source.name, row.id)


def _value(source: Source, row: Row, condition: Condition, facts: Facts) -> Any:
    """The prefix, the sentence, the policy, or the sha256 of the text."""
    if condition.id == "terms-copy":
        return source.text or ""
    if condition.id == "attribution":
        where = f", {source.origin}" if source.origin != "unknown" else ""
        return f"This model learned from {source.name}{where}, under {row.title}."
    if condition.id == "changes-stated":
        return f"This model was begun with {source.name} ({row.title}) and changed: it was trained further, or cut."
    if condition.id == "statement":
        return str(condition.value).replace("{name}", facts.student_name)
    return str(condition.value)


def _access(source: Source) -> Iterator[Reason]:
    """For a teacher that was not run from local weights: whose account, within which count, and nothing evaded."""
    access, terms = source.access, ", ".join(row.id for row in source.rows) or "unknown"

    def unless(known: bool, name: str, says: str) -> Iterator[Reason]:
        if not known:
            yield Reason(source.about, terms, f"access-{name}", "human", says)

    if access.route == "local-weights":
        return
    if access.route not in NOT_LOCAL:
        says = "How it was reached is unknown. Declare route: local-weights, own-account or published-outputs."
        yield Reason(source.about, terms, "access-route", "human", says)
        return
    if access.route == "own-account":
        says = "Declare whose account asked (account: an organisation, never a key): terms bind whoever holds it."
        yield from unless(access.account is not None, "account", says)
        says = (
            "Declare how many answers the account may ask for here (requests: a number within the provider's limits)."
        )
        yield from unless(access.requests is not None, "requests", says)
    says = "Declare that no limit was evaded, by other accounts, proxies or jailbreaks (terms.evasion: none)."
    yield from unless(access.evasion_none is True, "evasion", says)
    says = (
        "Declare that no withheld reasoning was extracted (terms.reasoning_traces: not-used, published, api-visible)."
    )
    yield from unless(access.reasoning_traces != "unknown", "reasoning-traces", says)

"""Teachers that are paid: asked ahead of the recording, rows without an answer left out, costs written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.checking import Check, Estimate
from stillroom.data.table import Table
from stillroom.errors import DataError, UsageError
from stillroom.files import read_json, write_json
from stillroom.recipes.recipe import Use
from stillroom.teachers.endpoint import Endpoint
from stillroom.teachers.endpoint.money import Outlook, break_even
from stillroom.teachers.endpoint.teacher import SAMPLE
from stillroom.teachers.ensemble import Ensemble

ENDPOINT = "endpoint"
ASKED, MONEY = "asked.json", "report/money.json"
FORMAT, MONEY_FORMAT = "stillroom-asked/1", "stillroom-money/1"
SCORED = 64  # labelled rows that preflight asks a paid teacher about
THOUSAND, HOUR = 1000, 3600.0


def has_endpoint(use: Use) -> bool:
    """Whether a recipe's teacher is an endpoint, or an ensemble with one."""
    members = use.arguments.get("members") if use.use == "ensemble" else None
    return use.use == ENDPOINT or any(has_endpoint(Use(**one)) for one in (members or {}).values())


def paid(teacher: Any) -> tuple[Endpoint, ...]:
    """The endpoints that a teacher is, or is made of."""
    return tuple(_paid(teacher))


def _paid(teacher: Any) -> Iterator[Endpoint]:
    if isinstance(teacher, Endpoint):
        yield teacher
    elif isinstance(teacher, Ensemble):
        for member in teacher.members.values():
            yield from _paid(member)


def asked_ahead(teacher: Any, rows: Table, role: str, folder: Path | None, progress: bool) -> Table:
    """The rows that have an answer of every endpoint; ``folder``/asked.json says which were set aside, and why.

    Other teachers' rows come back as they are. Raises UsageError for augmented rows: an endpoint is asked about each
    row once; DataError where no row is left.
    """
    found = paid(teacher)
    if not found:
        return rows
    if rows.augmented:
        raise UsageError("an endpoint is asked about each row once: leave out data.views and record.views.")
    aside: dict[str, str] = {}
    for one in found:
        aside |= one.ask_ahead(rows, progress)
    if folder is not None:
        _write(found, folder, role, rows, aside)
    return _without(rows, aside)


def asked_rows(teacher: Any, rows: Table, role: str, folder: Path, progress: bool) -> Table:
    """As ``asked_ahead``; where the run says already that all were asked, nothing is."""
    if (folder / ASKED).is_file():
        part = read_json(folder / ASKED)["rows"].get(role)
        if part is not None and part["rows"] == len(rows):
            return _without(rows, part["aside"])
    return asked_ahead(teacher, rows, role, folder, progress)


@dataclass(frozen=True)
class Few:
    """What preflight asks a paid teacher about: a few rows of the pool, fewer labelled ones; and what all will take."""

    pool: Table
    labelled: Table
    outlooks: tuple[Outlook, ...]

    def told(self) -> list[Check]:
        """What asking will take, for doctor."""
        return [Check("asking", True, str(one)) for one in self.outlooks]

    def of_all(self, found: Estimate, rows: int) -> Estimate:
        """An estimate from the few, for all ``rows``."""
        return dataclasses.replace(
            found,
            record_seconds=sum(one.seconds for one in self.outlooks),
            disk_bytes=found.disk_bytes * rows // len(self.pool),
        )


def sampled(teacher: Any, pool: Table, labelled: Table) -> Few:
    """Asks about a few rows, so that preflight and its estimate need no more."""
    outlooks = tuple(one.outlook(pool) for one in paid(teacher))
    few = [_spread(rows, count) for rows, count in ((pool, SAMPLE), (labelled, SCORED))]
    asked = [asked_ahead(teacher, rows, "", None, False) if len(rows) else rows for rows in few]
    return Few(asked[0], asked[1], outlooks)


def bill(teacher: Any, folder: Path) -> dict[str, Any] | None:
    """What answers cost, from teacher and student, and from which volume on the student is cheaper: report/money.json.

    The student's answer is its measured latency on a machine at ``price.machine_hour``. None without an endpoint.
    """
    found = paid(teacher)
    if not found:
        return None
    price = found[0].price
    report, student = read_json(folder / "report/report.json"), read_json(folder / "student/student.json")
    latency = (report["rows"]["student"].get("latency") or {}).get("value")
    each = sum(_each(one) for one in found)
    own = None if latency is None else latency / HOUR * price.machine_hour
    asking = sum(one.cost(one.totals()) for one in found)
    training = (student.get("seconds") or 0.0) / HOUR * price.machine_hour
    said = read_json(folder / ASKED)["rows"] if (folder / ASKED).is_file() else {}
    made = {
        "format": MONEY_FORMAT,
        "currency": price.currency,
        "machine_hour": price.machine_hour,
        "thousand": {"teacher": THOUSAND * each, "student": None if own is None else THOUSAND * own},
        "spent": {"asking": asking, "training": training},
        "break_even": None if own is None else break_even(asking + training, each, own),
        "rows": {role: {"asked": part["rows"], "aside": len(part["aside"])} for role, part in said.items()},
    }
    write_json(folder / MONEY, made)
    return made


def bill_line(made: dict[str, Any]) -> str:
    """The bill in one line for a terminal."""
    each, currency = made["thousand"], made["currency"]
    own = "unknown" if each["student"] is None else f"{each['student']:.4g}"
    back = "never cheaper" if made["break_even"] is None else f"won back after {made['break_even']:,.0f} answers"
    aside = sum(part["aside"] for part in made["rows"].values())
    spent = sum(made["spent"].values())
    return f"a thousand answers: teacher {each['teacher']:.4g} {currency}, student {own}; {spent:.4g} spent, {back}" + (
        f"; {aside} rows set aside" if aside else ""
    )


def _each(teacher: Endpoint) -> float:
    """The cost of one answer of the teacher: of all its draws and second attempts, over the examples answered."""
    totals = teacher.totals()
    return teacher.cost(totals) / max(totals.requests, 1) * teacher.samples


def _spread(rows: Table, count: int) -> Table:
    few = min(count, len(rows))
    return rows.select([place * len(rows) // few for place in range(few)])


def _without(rows: Table, aside: Mapping[str, str]) -> Table:
    kept = [number for number, name in enumerate(rows.ids) if name not in aside]
    if not kept and len(rows):
        name, why = next(iter(aside.items()))
        raise DataError(f"the teacher has no answer to any of {len(rows)} rows; {name!r}: {why}.")
    return rows if len(kept) == len(rows) else rows.select(kept)


def _write(found: tuple[Endpoint, ...], folder: Path, role: str, rows: Table, aside: Mapping[str, str]) -> None:
    there = read_json(folder / ASKED)["rows"] if (folder / ASKED).is_file() else {}
    spent = [
        {"model": one.model, "server": one.server.name, **dataclasses.asdict(one.totals()), "budget": one.budget,
         "cost": one.cost(one.totals()), "currency": one.price.currency}
        for one in found
    ]  # fmt: skip
    part = {"rows": len(rows), "aside": dict(aside)}
    write_json(folder / ASKED, {"format": FORMAT, "teachers": spent, "rows": {**there, role: part}})

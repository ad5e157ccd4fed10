"""README.md, the model card: rendered from the passport alone, so that the two cannot differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from stillroom.errors import CheckError
from stillroom.files import read_json, write_bytes
from stillroom.measures.wording import COSTS, compared, in_order, number, spread, title_of
from stillroom.provenance.manifest import existing
from stillroom.provenance.passport import PASSPORT
from stillroom.provenance.schema import validate

CARD = "README.md"
TEMPLATE = "card.md.j2"
MOST_COLUMNS = 9


def write_card(run_folder: str | Path) -> Path:
    """Write README.md from passport.json. Raises MissingFileError without one, CheckError when it is not valid."""
    folder = existing(run_folder)
    passport = read_json(folder / PASSPORT)
    problems = validate(passport)
    if problems:
        raise CheckError(f"{folder / PASSPORT} does not fit its schema: {problems[0]}. Write it again.")
    write_bytes(folder / CARD, render(passport).encode())
    return folder / CARD


def render(passport: Mapping[str, Any]) -> str:
    """The card of a valid passport: metadata as the Hugging Face hub reads it, then Markdown."""
    header = yaml.safe_dump(_header(passport), sort_keys=False, allow_unicode=True, width=1000)
    body = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            passport=passport,
            columns=_columns(passport),
            sentences=[compared(pair) for pair in (passport["evaluation"] or {}).get("comparisons", ())],
            unknown=list(unknowns(passport)),
        )
    )
    return f"---\n{header}---\n\n{body.strip()}\n"


def unknowns(passport: Mapping[str, Any]) -> Iterator[str]:
    """What a reader would want to know and the run's files do not say, one sentence each."""
    student = passport["student"]
    if student["licence"] == "unknown":
        yield "The licence of the student is unknown: nobody has chosen one."
    if student["init"] == "unknown":
        yield "What the student's weights were before training is unknown."
    for teacher in passport["teachers"]:
        for field in ("licence", "source"):
            if teacher[field] == "unknown":
                yield f"The {field} of the teacher {teacher['name']} is unknown."
        if teacher["digest"] is None:
            yield f"Which weights of the teacher {teacher['name']} answered is unknown."
    if not passport["teachers"]:
        yield "No teacher is named: as far as the files say, this student was trained without one."
    for data in passport["data"]:
        for field in ("licence", "source"):
            if data[field] == "unknown":
                yield f"The {field} of the {data['role']} data is unknown."
    if passport["evaluation"] is None:
        yield "The student has not been evaluated."


def _header(passport: Mapping[str, Any]) -> dict[str, Any]:
    """No base_model unless weights were inherited: a student that began at random is nobody's fine-tune."""
    student = passport["student"]
    teachers = [teacher["source"] if "/" in teacher["source"] else teacher["name"] for teacher in passport["teachers"]]
    names = [data["name"] for data in passport["data"] if data["role"] == "training" and data["name"] != "unknown"]
    header: dict[str, Any] = {
        "license": student["licence"].lower(),
        "library_name": "pytorch",
        "tags": ["knowledge-distillation", "stillroom", *(f"distilled-from:{teacher}" for teacher in teachers)],
    }
    if student["init_from"] and student["init"] in ("pretrained", "teacher-weights"):
        header["base_model"] = student["init_from"]
    if names:
        header["datasets"] = names
    if passport["evaluation"]:
        header["metrics"] = [passport["evaluation"]["metric"]]
    return header


def _columns(passport: Mapping[str, Any]) -> list[str]:
    """The headline, the other measures that the student has, then what it costs."""
    evaluation = passport["evaluation"]
    if not evaluation:
        return []
    known = list(dict.fromkeys(name for cells in evaluation["rows"].values() for name in cells))
    measured = [name for name in known if name not in COSTS and name != evaluation["metric"]]
    costs = [name for name in COSTS if name in known]
    return [evaluation["metric"], *measured[: MOST_COLUMNS - 1 - len(costs)], *costs]


class _Code(str):
    """Text inside a code block or quotes of code, where nothing is escaped."""


def _code(value: str) -> _Code:
    return _Code("".join(c if c.isprintable() and c != "`" else " " for c in value))


def _plain(value: Any) -> Any:
    """Every value that goes into the page: one line, and no Markdown or HTML of its own."""
    if not isinstance(value, str) or isinstance(value, _Code):
        return value
    line = "".join(c if c.isprintable() else " " for c in value)
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def _cell(cell: Mapping[str, float] | None, name: str) -> str:
    if cell is None or not all(math.isfinite(cell[part]) for part in ("value", "low", "high")):
        return "–"
    around = spread(cell, name)
    return f"{number(cell['value'], name)} ({around})" if around else number(cell["value"], name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("stillroom.provenance", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_plain,
    )
    environment.globals.update(cell=_cell, title_of=title_of, number=number, in_order=in_order)
    environment.filters["code"] = _code
    return environment

"""Answers in words against a person's, and against the teacher's: equal, alike, and field by field."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jsonschema
import torch
from torch import Tensor

from stillroom.errors import DataError
from stillroom.measures.scored import Scored
from stillroom.measures.sums import RatioOfSums
from stillroom.types import Batch, Metric, Signal

SHOWN = 8  # answers side by side on the page
# The numbers of an example. ``known``: 1 where a person's answer is there; ``fields``: right ones, of ``asked``.
COLUMNS = ("exact", "f1", "known", "same", "usable", "fields", "asked")
_OUTSIDE = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """Without case, punctuation and surplus blanks, as SQuAD compares (Rajpurkar et al. 2016); articles stay."""
    return " ".join(text.casefold().translate(_OUTSIDE).split())


def token_f1(answer: str, wanted: str) -> float:
    """2 |common words| / (|words of one| + |words of the other|), over multisets; 1 where both are empty."""
    ours, theirs = Counter(plain(answer).split()), Counter(plain(wanted).split())
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


def scored(
    answers: Mapping[str, str],
    teacher: Mapping[str, str],
    human: Mapping[str, str | None],
    schema: Mapping[str, Any] | None = None,
) -> Scored:
    """The numbers of every answer. With a ``schema`` answers are JSON, compared as values and field by field.

    Raises DataError for a person's answer that is no JSON where there is a schema.
    """
    wanted = {name: None if schema is None else _value(name, text) for name, text in human.items()}
    rows = {name: _row(text, teacher[name], human[name], wanted[name], schema) for name, text in answers.items()}
    return Scored(rows)


def _value(name: str, text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        raise DataError(
            f"a person's answer to {name!r} is {text!r}, which is no JSON, and writes.fields asks for it."
        ) from None


def _row(
    text: str, teacher: str, human: str | None, wanted: Any, schema: Mapping[str, Any] | None
) -> tuple[float, ...]:
    right = asked = 0
    if schema is None:
        usable = bool(plain(text))
        same, exact = plain(text) == plain(teacher), human is not None and plain(text) == plain(human)
    else:
        said, theirs = read_json_answer(text, schema), read_json_answer(teacher, schema)
        right, asked = _fields(said, wanted)
        usable = said is not None
        text, teacher = _canonical(said, text), _canonical(theirs, teacher)
        human = None if human is None else _canonical(wanted, human)
        same, exact = text == teacher, text == human
    f1 = 0.0 if human is None else token_f1(text, human)
    return tuple(map(float, (exact, f1, human is not None, same, usable, right, asked)))


def read_json_answer(text: str, schema: Mapping[str, Any]) -> Any:
    """The value that a text is as JSON, where it satisfies the schema; else None."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if jsonschema.Draft202012Validator(schema).is_valid(found) else None


def _canonical(value: Any, text: str) -> str:
    return text if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _fields(said: Any, wanted: Any) -> tuple[int, int]:
    """How many of the wanted fields were said right, and how many there are."""
    if not isinstance(wanted, dict):
        return 0, 0
    ours = said if isinstance(said, dict) else {}
    return sum(_equal(ours.get(name), value) for name, value in wanted.items() if name in ours), len(wanted)


def _equal(ours: Any, theirs: Any) -> bool:
    both = isinstance(ours, str) and isinstance(theirs, str)
    return plain(ours) == plain(theirs) if both else ours == theirs


def _pair(signal: Signal, first: str, second: str | None) -> Tensor:
    values = signal.need_values("answers in words").double()
    chosen = values[:, COLUMNS.index(first)]
    counted = torch.ones_like(chosen) if second is None else values[:, COLUMNS.index(second)]
    return torch.stack([chosen, counted], -1)


def exact(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The share of answers that equal a person's, case and punctuation aside."""
    return _pair(student, "exact", "known")


def f1(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The words that an answer has in common with a person's: their F1, mean over examples."""
    return _pair(student, "f1", "known")


def fields(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The share of a person's fields that an answer has right."""
    return _pair(student, "fields", "asked")


def same(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The share of answers that equal the teacher's."""
    return _pair(student, "same", None)


def usable(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The share of answers that are not empty, and satisfy the schema where there is one."""
    return _pair(student, "usable", None)


def metrics_for(has_human: bool, schema: Mapping[str, Any] | None) -> tuple[Metric, ...]:
    """What applies: without a person's answers there is only agreement with the teacher."""
    mean = RatioOfSums()
    person = (Metric("exact", exact, mean), Metric("token_f1", f1, mean)) if has_human else ()
    parts = (Metric("fields", fields, mean),) if has_human and schema is not None else ()
    return (*person, *parts, Metric("agreement", same, mean, against_teacher=True), Metric("usable", usable, mean))


def lines_of(texts: Mapping[str, Mapping[str, str]], human: Mapping[str, str | None]) -> bytes:
    """JSON Lines: of each question what a person answered, and each row of ``texts`` (the teacher, the students)."""
    names = {name: {who: said[name] for who, said in texts.items()} for name in human}
    rows = ({"id": name, "person": person, **names[name]} for name, person in human.items())
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def beside(
    texts: Mapping[str, Mapping[str, str]], questions: Mapping[str, str], human: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """Some answers side by side, for the page: those first where student and teacher differ."""
    order = sorted(questions, key=lambda name: texts["student"][name] == texts["teacher"][name])
    return [
        {
            "id": name,
            "prompt": questions[name],
            "text": human[name] or "",
            "rows": {who: {"text": said[name], "ended": True} for who, said in texts.items()},
        }
        for name in order[:SHOWN]
    ]

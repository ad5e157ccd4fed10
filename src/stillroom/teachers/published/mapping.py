"""Which column is what, and what one row answers: checked number by number, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stillroom.errors import UsageError, nearest

Kind = Literal["label", "probabilities", "log_probs", "logits", "values", "text"]
KINDS: tuple[Kind, ...] = ("label", "probabilities", "log_probs", "logits", "values", "text")
TOLERANCE = 1e-3  # of a sum of probabilities: published numbers are rounded
Columns = str | Sequence[str]


class BadRowError(Exception):
    """Why a row cannot be used; the row is set aside with this reason."""


@dataclass(frozen=True)
class Answers:
    """What the answers are and where they stand.

    ``columns``: one column (a number, a text, a list, or an object by class), or one column for each number.
    ``classes``: the order of the numbers, and the labels that are known. ``rename``: their names to ours.
    """

    kind: Kind
    columns: Columns
    classes: tuple[str, ...] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)

    def read(self, row: Mapping[str, Any]) -> list[float] | str:
        """A row's answer: numbers (log-probabilities or logits [C], values [D]) or a text. Raises BadRowError."""
        found = self._found(row)
        if self.kind == "text":
            if not isinstance(found, str) or not found.strip():
                raise BadRowError("no text")
            return found
        if self.kind == "label":
            return self._label(found)
        numbers = self._numbers(found)
        return _CHECKS[self.kind](numbers)

    def _found(self, row: Mapping[str, Any]) -> Any:
        names = [self.columns] if isinstance(self.columns, str) else list(self.columns)
        lacking = [name for name in names if row.get(name) is None]
        if lacking:
            raise BadRowError(f"no {lacking[0]!r}")
        return row[self.columns] if isinstance(self.columns, str) else [row[name] for name in names]

    def _label(self, found: Any) -> list[float]:
        name = self.rename.get(str(found), str(found))
        assert self.classes is not None
        if name not in self.classes:
            raise BadRowError("unknown class")
        return [0.0 if name == known else -math.inf for known in self.classes]

    def _numbers(self, found: Any) -> list[float]:
        if isinstance(found, Mapping):
            found = self._in_order(found)
        if not isinstance(found, Sequence) or isinstance(found, str):
            found = [found]
        try:
            numbers = [float(number) for number in found]
        except (TypeError, ValueError):
            raise BadRowError("not numbers") from None
        if self.kind != "values" and self.classes is not None and len(numbers) != len(self.classes):
            raise BadRowError(f"{len(numbers)} numbers for {len(self.classes)} classes")
        if any(math.isnan(number) or number == math.inf for number in numbers):
            raise BadRowError("not finite")
        return numbers

    def _in_order(self, found: Mapping[str, Any]) -> list[Any]:
        """{class: number} in the order of the classes; Parquet gives a class that a row lacks as None."""
        assert self.classes is not None
        known = {self.rename.get(name, name): number for name, number in found.items() if number is not None}
        if set(known) - set(self.classes):
            raise BadRowError("unknown class")
        if set(self.classes) - set(known):
            raise BadRowError(f"{len(known)} numbers for {len(self.classes)} classes")
        return [known[name] for name in self.classes]


def _probabilities(numbers: list[float]) -> list[float]:
    if any(not 0 <= number <= 1 + TOLERANCE for number in numbers):
        raise BadRowError("a probability outside 0 to 1")
    total = math.fsum(numbers)
    if abs(total - 1) > TOLERANCE:
        raise BadRowError("does not sum to 1")
    return [math.log(number / total) if number > 0 else -math.inf for number in numbers]


def _log_probs(numbers: list[float]) -> list[float]:
    if any(number > TOLERANCE for number in numbers):
        raise BadRowError("a log-probability above 0")
    return _probabilities([math.exp(number) for number in numbers]) if _far(numbers) else _normalised(numbers)


def _far(numbers: list[float]) -> bool:
    """Whether the probabilities sum to something else than 1; said by ``_probabilities``."""
    return abs(math.fsum(math.exp(number) for number in numbers) - 1) > TOLERANCE


def _normalised(numbers: list[float]) -> list[float]:
    # stays in logs: a log-probability of -200 is no probability of 0
    total = math.log(math.fsum(math.exp(number) for number in numbers))
    return [number - total for number in numbers]


def _finite(numbers: list[float]) -> list[float]:
    if any(math.isinf(number) for number in numbers):
        raise BadRowError("not finite")
    return numbers


_CHECKS = {"probabilities": _probabilities, "log_probs": _log_probs, "logits": _finite, "values": _finite}


def answers_of(given: Mapping[str, Any], classes: Sequence[str] | None, rename: Mapping[str, str]) -> Answers:
    """The mapping that a recipe gives. Raises UsageError for none or several answers, or a missing class order."""
    named = {kind: columns for kind, columns in given.items() if columns is not None}
    if len(named) != 1:
        said = f"{', '.join(named)} are given" if named else "none is"
        raise UsageError(f"published: say in which column the answers stand: one of {', '.join(KINDS)} ({said}).")
    ((kind, columns),) = named.items()
    if kind not in KINDS:
        raise UsageError(f"published: unknown answers {kind!r}{nearest(kind, KINDS)}")
    order = tuple(map(str, classes)) if classes else None
    if order is None and kind == "label":
        raise UsageError("published: labels need classes: [...], or data that have classes.")
    if order is not None and len(set(order)) < len(order):
        raise UsageError(f"published: a class is named twice in {list(order)}.")
    return Answers(kind, columns, order, {str(k): str(v) for k, v in rename.items()})  # type: ignore[arg-type]

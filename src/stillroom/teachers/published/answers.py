"""published: a data set of answers as a teacher. Rows are checked one by one and joined to our examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.digests import json_digest
from stillroom.errors import DataError, PairError, SignalError, UsageError
from stillroom.files import write_json
from stillroom.teachers.published.mapping import Answers, BadRowError, Columns, answers_of
from stillroom.teachers.published.place import Source, source_of
from stillroom.types import Batch, Dense, Examples, Identity, Signal

Key = tuple[str, ...]
Missing = Literal["error", "leave_out"]
SHOWN = 3  # examples in a message
ASIDE = "set-aside.json"


@dataclass(frozen=True, eq=False)
class Published:
    """See ``published``. ``rows``: key -> row of ``numbers`` [N, ...] or ``texts``; ``aside``: place, key, reason."""

    answers: Answers
    rows: Mapping[Key, int]
    numbers: Tensor | None
    texts: Sequence[str]
    aside: Sequence[tuple[str, Key | None, str]]
    match: Mapping[str, str]  # their column -> our column; empty: by id
    missing: Missing
    identity: Identity
    workspace: Path | None = None

    def __call__(self, batch: Batch) -> Signal:
        """Raises DataError, naming examples, for what has no answer; UsageError for augmented views."""
        if batch.views is not None:
            raise UsageError("published answers are of the examples as they are: leave out views (data.views).")
        keys = self._keys(batch)
        lacking = [name for name, key in zip(batch.ids, keys, strict=True) if key not in self.rows]
        if lacking:
            raise DataError(self._lack(lacking, dict(zip(batch.ids, keys, strict=True)), len(batch)))
        places = [self.rows[key] for key in keys]
        if self.numbers is None:
            return Signal(text=tuple(self.texts[place] for place in places))
        numbers = self.numbers[torch.tensor(places, dtype=torch.int64)]
        return Signal(values=numbers) if self.answers.kind == "values" else Signal(logits=Dense(numbers))

    def covering(self, examples: Examples, what: str = "examples") -> Examples:
        """The examples that have an answer; with ``missing='error'`` all must.

        Those that are left out are counted in ``workspace``/left-out-WHAT.json. Raises DataError.
        """
        keys = self._all_keys(examples)
        lacking = [name for name, key in keys.items() if key not in self.rows]
        if lacking and (self.missing == "error" or len(lacking) == len(keys)):
            raise DataError(self._lack(lacking, keys, len(keys), what))
        if self.workspace is not None:
            write_json(self.workspace / f"left-out-{what}.json", {"rows": len(keys), "left_out": lacking})
        return self.answered(examples) if lacking else examples

    def answered(self, examples: Examples) -> Examples:
        """The examples that have an answer, possibly none."""
        keys = self._all_keys(examples)
        return examples.select([n for n, key in enumerate(keys.values()) if key in self.rows])  # type: ignore[attr-defined]

    def _all_keys(self, examples: Examples) -> dict[str, Key]:
        keys: dict[str, Key] = {}
        for start in range(0, len(examples), 512):
            batch = examples.batch(range(start, min(start + 512, len(examples))), None)
            keys |= dict(zip(batch.ids, self._keys(batch), strict=True))
        return keys

    def told(self) -> str:
        """'96 of 100 rows can be used; set aside: 2 does not sum to 1, 2 unknown class', for people."""
        total = len(self.rows) + len(self.aside)
        said = f"{len(self.rows)} of {total} published rows can be used"
        reasons = Counter(reason for _, _, reason in self.aside)
        shown = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(6))
        return f"{said}; set aside: {shown}" if shown else said

    def _keys(self, batch: Batch) -> list[Key]:
        if not self.match:
            return [(name,) for name in batch.ids]
        columns = []
        for ours in self.match.values():
            column = batch.inputs.get(ours)
            if column is None or isinstance(column, Tensor):
                texts = [name for name, c in batch.inputs.items() if not isinstance(c, Tensor)]
                raise UsageError(f"published: match needs a column of texts, not {ours!r}; there are {texts}.")
            columns.append(column)
        return list(zip(*columns, strict=True))

    def _lack(self, lacking: list[str], keys: Mapping[str, Key], of: int, what: str = "examples") -> str:
        reasons = {key: f"{place}: {reason}" for place, key, reason in self.aside if key is not None}
        some = "; ".join(f"{n!r} ({reasons.get(keys[n], 'not in the file')})" for n in lacking[:SHOWN])
        every = " None of them has one: check that ids or match lead to the same names." if len(lacking) == of else ""
        return (
            f"{len(lacking)} of {of} {what} have no published answer: {some}.{every} Add them, or set missing: "
            "leave_out to go on without such rows."
        )


def published(
    path: str | Path,
    *,
    id: str | None = None,
    match: Mapping[str, str] | None = None,
    label: str | None = None,
    probabilities: Columns | None = None,
    log_probs: Columns | None = None,
    logits: Columns | None = None,
    values: Columns | None = None,
    text: str | None = None,
    classes: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    missing: Missing = "error",
    split: str | None = None,
    by: str | None = None,
    licence: str | None = None,
    examples: Any = None,
    folder: Path | None = None,
    workspace: Path | None = None,
) -> Published:
    """A teacher from answers that someone published: JSON Lines, Parquet, a folder of them, or 'hf:org/name'.

    ``id``: the column of our examples' ids; or ``match``: their column -> our text column, joined where the texts are
    equal. One of ``label``, ``probabilities``, ``log_probs``, ``logits``, ``values``, ``text`` names the column of the
    answers; numbers stand in one column (a list, or an object by class) or in one column each. ``classes``: the order
    of the numbers, by default that of the data. ``rename``: their class names to ours. ``by``: the model that wrote
    them, for the gate. ``missing``: an example without an answer is an error, or its row is left out.

    Rows that cannot be used are set aside with their reason, all of them in ``workspace``/set-aside.json: wrong
    length, not finite, probabilities that do not sum to 1 (within 0.001; what is within is scaled to 1), an unknown
    class, nothing there, an id that occurs again with other content (all of that id). A label is a distribution of
    probability 1.

    Raises MissingFileError, UsageError for a mapping that leads nowhere, PairError for other classes than the data's,
    DataError where no row can be used.
    """
    if missing not in ("error", "leave_out"):
        raise UsageError(f"published: missing is {missing!r}; choose error or leave_out.")
    if (id is None) == (match is None):
        raise UsageError("published: give id: COLUMN of our ids, or match: {their_column: our_column}, one of them.")
    given = {"label": label, "probabilities": probabilities, "log_probs": log_probs, "logits": logits}
    given |= {"values": values, "text": text}
    ours = getattr(examples, "classes", None)
    answers = answers_of(given, classes or ours, rename or {})
    order = _order(answers, ours)
    source = source_of(path, folder, split)
    read, aside = _read(source, answers, [id] if id else list(match or {}))
    rows = {key: number for number, key in enumerate(read)}
    numbers = None if answers.kind == "text" else _stacked(read, order)
    texts = [str(said) for said in read.values()] if answers.kind == "text" else []
    made = Published(
        dataclasses.replace(answers, classes=tuple(ours) if ours and order else answers.classes),
        rows, numbers, texts, aside, dict(match or {}), missing, _identity(source, answers, given, ours, licence, by),
        workspace,
    )  # fmt: skip
    if not read:
        raise DataError(f"{source.name}: no row can be used. {made.told()}.")
    if workspace is not None:
        shown = [{"place": place, "key": list(key or ()), "reason": reason} for place, key, reason in aside]
        write_json(workspace / ASIDE, {"source": source.source, "used": len(read), "set_aside": shown})
    return made


def _order(answers: Answers, ours: Sequence[str] | None) -> list[int] | None:
    """Where each of our classes stands among theirs; None where there is nothing to reorder."""
    if answers.classes is None or not ours or answers.kind in ("values", "text"):
        return None
    if sorted(answers.classes) != sorted(ours):
        raise PairError(
            f"published: the answers are about {', '.join(answers.classes[:6])}; the data's classes are "
            f"{', '.join(list(ours)[:6])}. Name theirs in their order (classes), or rename: {{theirs: ours}}."
        )
    return [answers.classes.index(name) for name in ours]


def _read(
    source: Source, answers: Answers, names: list[str]
) -> tuple[dict[Key, Any], list[tuple[str, Key | None, str]]]:
    """The usable rows by key, and what was set aside."""
    read: dict[Key, Any] = {}
    places: dict[Key, str] = {}
    aside: list[tuple[str, Key | None, str]] = []
    contradicted: set[Key] = set()
    for line in source.lines():
        key: Key | None = None
        try:
            if line.row is None:
                raise BadRowError(line.wrong)
            if any(line.row.get(name) in (None, "") for name in names):
                raise BadRowError(f"no {next(name for name in names if line.row.get(name) in (None, ''))!r}")
            key = tuple(str(line.row[name]) for name in names)
            said = answers.read(line.row)
            if len(read) and _length(said) != _length(next(iter(read.values()))):
                raise BadRowError(f"{_length(said)} numbers, where the first has {_length(next(iter(read.values())))}")
            if key in read and read[key] != said:
                contradicted.add(key)
                raise BadRowError(CONTRADICTED)
        except BadRowError as error:
            aside.append((line.place, key, str(error)))
            continue
        read.setdefault(key, said)
        places.setdefault(key, line.place)
    for key in contradicted:  # which of them is right is not ours to guess
        aside.append((places[key], key, CONTRADICTED))
        del read[key]
    return read, aside


CONTRADICTED = "an id that occurs again with another answer"


def _length(said: Any) -> int:
    return 1 if isinstance(said, str) else len(said)


def _stacked(read: Mapping[Key, Any], order: list[int] | None) -> Tensor:
    if not read:
        return torch.empty(0)
    numbers = torch.tensor(list(read.values()), dtype=torch.float32)
    if numbers.isinf().logical_and(numbers > 0).any():
        raise SignalError("published: a number does not fit into 32 bits.")
    return numbers if order is None else numbers[:, order]


def _identity(
    source: Source, answers: Answers, given: Mapping[str, Any], ours: Any, licence: str | None, by: str | None
) -> Identity:
    """Who answered: known by the files' content and the mapping that reads them."""
    mapping = {"answers": {k: v if isinstance(v, str) or v is None else list(v) for k, v in given.items()}}
    mapping |= {"classes": list(answers.classes or ()), "rename": dict(answers.rename)}
    classes = None
    if answers.kind not in ("values", "text"):
        classes = tuple(ours) if ours else answers.classes
    return Identity(
        name=f"{by}, as published in {source.name}" if by else source.name,
        digest=json_digest({"files": source.digest, **mapping}),
        kind="published",
        licence=licence or source.licence,
        route="published-outputs",
        source=source.source,
        revision=source.revision,
        classes=classes,
    )

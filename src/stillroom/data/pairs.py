"""The same texts as tokens of two tokenizers, with where each stands against the other.

One document, or one piece of a long one, per row. In memory: for corpora larger than that, pair parts of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from stillroom.data.tokens import PADDING, Packed
from stillroom.errors import DataError, PairError, UsageError
from stillroom.language import boundaries, byte_lengths, tokenizer_digest
from stillroom.language.alignment import Coverage, Span, align, coverage_in_all, pieces_of, spellings
from stillroom.types import UNLABELLED, Batch

NOWHERE = -1


class _Row(NamedTuple):
    name: str
    document: int
    teacher: list[int]  # labels: the tokens of the text, and perhaps an end
    student: list[int]
    spans: list[Span]


@dataclass(frozen=True, eq=False)
class Paired:
    """Rows of a student's tokens beside the teacher's, an Examples.

    ``student`` and ``teacher`` are the rows of each side as ordinary Packed examples of equal ids: record the teacher
    on ``teacher``, evaluate anything on either. Every position belongs to a span: tokens of equal bytes.
    A batch is the student's (tokens, positions, labels, mask, extra), with these inputs beside:
    ``teacher_tokens``, ``teacher_positions``, ``teacher_labels`` [B, U]; ``span`` [B, T] and ``teacher_span`` [B, U]:
    the number of the span that a position's label belongs to, -1 where there is none; ``teacher_index`` [B, T]: the
    teacher's position after the same bytes as the student's, -1 where the teacher has none (within a span).
    """

    student: Packed
    teacher: Packed
    span: np.ndarray  # [N, T] int32
    teacher_span: np.ndarray  # [N, U] int32
    teacher_index: np.ndarray  # [N, T] int32
    coverage: Coverage
    only_aligned: bool = False  # see ``aligned_only``

    augmented = False
    classes = None

    def __len__(self) -> int:
        return len(self.student)

    @property
    def ids(self) -> tuple[str, ...]:
        return self.student.ids

    @property
    def tokenizer(self) -> str:
        """The student's digest: these rows are its tokens."""
        return self.student.tokenizer

    @property
    def template(self) -> str | None:
        return self.student.template

    @property
    def name(self) -> str:
        return self.student.name

    @property
    def licence(self) -> str:
        return self.student.licence

    @property
    def source(self) -> str:
        return self.student.source

    @property
    def facts(self) -> dict[str, Any]:
        """The student's, and the coverage."""
        return {**self.student.facts, **dataclasses.asdict(self.coverage)}

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Batch:
        """These rows. Raises DataError for a row that does not exist."""
        ours, theirs = self.student.batch(indices, views), self.teacher.batch(indices)
        rows = np.asarray(list(indices), dtype=np.int64)
        arrays = {"span": self.span, "teacher_span": self.teacher_span, "teacher_index": self.teacher_index}
        beside = {
            "teacher_tokens": theirs.inputs["tokens"],
            "teacher_positions": theirs.inputs["positions"],
            "teacher_labels": theirs.labels,
            **{name: torch.from_numpy(array[rows].astype(np.int64)) for name, array in arrays.items()},
        }
        paired = dataclasses.replace(ours, inputs={**ours.inputs, **beside})
        if not self.only_aligned:
            return paired
        return dataclasses.replace(paired, mask=beside["teacher_index"] != NOWHERE)

    def aligned_only(self) -> Paired:
        """The same rows, of which only the aligned positions count: for measures against the teacher.

        Elsewhere it has no answer, and a divergence or an agreement there would mean nothing.
        """
        return dataclasses.replace(self, only_aligned=True)

    def select(self, indices: Sequence[int]) -> Paired:
        """These rows only, in this order; the coverage stays that of all."""
        rows = np.asarray(list(indices), dtype=np.int64)
        chosen = {name: getattr(self, name)[rows] for name in ("span", "teacher_span", "teacher_index")}
        return dataclasses.replace(
            self, student=self.student.select(indices), teacher=self.teacher.select(indices), **chosen
        )


def pair(
    documents: Iterable[str | tuple[str, str]],
    student: Any,
    teacher: Any,
    length: int = 512,
    teacher_length: int | None = None,
    *,
    too_long: Literal["split", "refuse"] = "split",
    name: str = "texts",
    licence: str = "unknown",
    source: str = "unknown",
) -> Paired:
    """Texts (or (id, text) pairs) as rows of ``length`` student tokens and ``teacher_length`` teacher tokens.

    ``student`` and ``teacher`` are tokenizers. A document that is too long for a row on either side is split where
    both have a boundary; each piece begins anew with the mark of a beginning, so that both sides still have the same
    bytes before them. Raises PairError, naming the document, where the two do not spell the same bytes, and DataError
    for a document without text, or too long when that is refused.
    """
    size = (length, teacher_length or length)
    if min(size) < 2:
        raise UsageError(f"rows of {size[0]} and {size[1]} tokens cannot be used: a row needs 2 tokens or more.")
    rows: list[_Row] = []
    aligned: list[tuple[list[Span], list[bytes]]] = []
    count = split = 0
    for found_name, theirs, ours, spans, pieces in _encoded(documents, student, teacher):
        aligned.append((spans, pieces))
        parts = list(_parts(spans, size))
        if len(parts) > 1 and too_long == "refuse":
            raise DataError(
                f"document {found_name!r} has {len(theirs)} teacher and {len(ours)} student tokens, but rows hold "
                f"{size[1]} and {size[0]}. Raise the lengths, cut it, or allow too_long='split'."
            )
        for number, part in enumerate(parts):
            (t0, _, s0, _), (_, t1, _, s1) = part[0], part[-1]
            title = found_name if number == 0 else f"{found_name}#{number + 1}"
            moved = [(a - t0, b - t0, c - s0, d - s0) for a, b, c, d in part]
            rows.append(_Row(title, count, theirs[t0:t1], ours[s0:s1], moved))
        count, split = count + 1, split + (len(parts) > 1)
    if not rows:
        raise DataError("there are no documents. Check the path, the split and the filter.")
    about = {"name": name, "licence": licence, "source": source, "facts": {"documents": count, "split": split}}
    numbers = [row.document for row in rows]
    names = tuple(row.name for row in rows)
    ours_packed = _packed(names, numbers, [row.student for row in rows], student, size[0], about)
    theirs_packed = _packed(names, numbers, [row.teacher for row in rows], teacher, size[1], about)
    return Paired(ours_packed, theirs_packed, *_arrays(rows, size), coverage_in_all(aligned))


def _encoded(
    documents: Iterable[Any], student: Any, teacher: Any
) -> Iterator[tuple[str, list[int], list[int], list[Span], list[bytes]]]:
    """Each document: its id, the labels of both sides (the text and an end), their spans, the student's pieces."""
    sides = {"teacher": teacher, "student": student}
    spelling = {whose: spellings(tokenizer) for whose, tokenizer in sides.items()}
    ends = {whose: boundaries(tokenizer)[1] for whose, tokenizer in sides.items()}
    for number, given in enumerate(documents):
        name, text = given if isinstance(given, tuple) else (f"{number:08d}", given)
        if not isinstance(text, str):
            raise DataError(f"document {name!r} is {type(text).__name__}; texts are paired, and chats are not yet.")
        if not text:
            raise DataError(f"document {name!r} holds no text. Leave it out.")
        ids, pieces = {}, {}
        try:
            for whose, tokenizer in sides.items():
                ids[whose] = tokenizer(text, add_special_tokens=False)["input_ids"]
                pieces[whose] = [*pieces_of(ids[whose], text, spelling[whose], whose), b""]
            spans = align(pieces["teacher"], pieces["student"])
        except PairError as error:
            raise PairError(f"document {name!r}: {error}") from None
        labels = {whose: [*found, ends[whose]] for whose, found in ids.items()}
        yield name, labels["teacher"], labels["student"], spans, pieces["student"]


def _parts(spans: Sequence[Span], size: tuple[int, int]) -> Iterator[list[Span]]:
    """Runs of spans that fit into a row on both sides (student's and teacher's length)."""
    part: list[Span] = []
    for span in spans:
        t0, t1, s0, s1 = span
        if s1 - s0 > size[0] or t1 - t0 > size[1]:
            raise DataError(
                f"{s1 - s0} student and {t1 - t0} teacher tokens have no common boundary; a row holds {size[0]} and "
                f"{size[1]}. Raise the lengths."
            )
        if part and (s1 - part[0][2] > size[0] or t1 - part[0][0] > size[1]):
            yield part
            part = []
        part.append(span)
    yield part


def _packed(
    names: tuple[str, ...],
    numbers: Sequence[int],
    wanted: Sequence[list[int]],
    tokenizer: Any,
    length: int,
    about: dict[str, Any],
) -> Packed:
    """One side's rows: a begin and the labels but the last as tokens; the labels already the next token."""
    begin, end = boundaries(tokenizer)
    shape = (len(names), length)
    tokens, labels, documents = (np.full(shape, fill, dtype=np.int32) for fill in (end, UNLABELLED, PADDING))
    for row, (number, found) in enumerate(zip(numbers, wanted, strict=True)):
        part = (row, slice(0, len(found)))
        tokens[part], labels[part], documents[part] = [begin, *found[:-1]], found, number
    held = sum(map(len, wanted))
    facts = {**about["facts"], "tokens": held, "padding": round(1 - held / tokens.size, 4)}
    known = {"byte_lengths": byte_lengths(tokenizer), "tokenizer": tokenizer_digest(tokenizer)}
    return Packed(tokens, labels, documents, names, **known, **{**about, "facts": facts})


def _arrays(rows: Sequence[_Row], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of each student and each teacher position's span, and the teacher's position of each span's first."""
    span = np.full((len(rows), size[0]), NOWHERE, dtype=np.int32)
    teacher_span = np.full((len(rows), size[1]), NOWHERE, dtype=np.int32)
    teacher_index = np.full((len(rows), size[0]), NOWHERE, dtype=np.int32)
    for number, row in enumerate(rows):
        for which, (t0, t1, s0, s1) in enumerate(row.spans):
            span[number, s0:s1], teacher_span[number, t0:t1], teacher_index[number, s0] = which, which, t0
    return span, teacher_span, teacher_index

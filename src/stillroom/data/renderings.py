"""Conversations in two renderings, the student's and the teacher's, of one tokenizer: same answers, other prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stillroom.data.packing import pack
from stillroom.data.pairs import NOWHERE
from stillroom.data.tokens import Packed
from stillroom.errors import DataError, PairError
from stillroom.language.chat import Chat, Message
from stillroom.types import UNLABELLED, Batch


@dataclass(frozen=True, eq=False)
class Rendered:
    """Rows of the student's rendering beside the teacher's, an Examples; one conversation per row.

    A batch is the student's, with ``teacher_tokens`` and ``teacher_positions`` [B, U] beside, and ``teacher_index``
    [B, T]: where in the teacher's row the same token of an answer is predicted, -1 where none is.
    ``teacher`` is the teacher's side as ordinary Packed examples: record on it.
    """

    student: Packed
    teacher: Packed
    teacher_index: np.ndarray  # [N, T] int32

    augmented = False
    classes = None
    template = None  # each side has its own, and neither is compared with the other

    def __len__(self) -> int:
        return len(self.student)

    def __getattr__(self, name: str) -> Any:
        if name in ("ids", "tokenizer", "name", "licence", "source", "facts"):
            return getattr(self.student, name)
        raise AttributeError(name)

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Batch:
        """These rows. Raises DataError for a row that does not exist."""
        ours, theirs = self.student.batch(indices, views), self.teacher.batch(indices)
        index = torch.from_numpy(self.teacher_index[np.asarray(list(indices), dtype=np.int64)].astype(np.int64))
        beside = {f"teacher_{name}": column for name, column in theirs.inputs.items()}
        return dataclasses.replace(ours, inputs={**ours.inputs, **beside, "teacher_index": index})


def render_apart(
    conversations: Iterable[tuple[str, Sequence[Message]]],
    tokenizer: Any,
    chat: Chat,
    teacher_chat: Chat,
    length: int = 512,
    teacher_length: int | None = None,
    **about: Any,
) -> Rendered:
    """(id, messages) pairs in both renderings. What counts, the answers, must be the same tokens on both sides.

    ``about``: name, licence, source. Raises PairError, naming the conversation, where the answers differ (another end
    mark, thoughts on one side only), DataError for one that is longer than a row.
    """
    known = list(conversations)
    sides = []
    for rendering, size in ((chat, length), (teacher_chat, teacher_length or length)):
        if rendering.learn == "all":
            raise DataError("two renderings share the answers only: choose learn='answers' or 'last'.")
        sides.append(pack(known, tokenizer, size, chat=rendering, together=False, too_long="refuse", **about))
    ours, theirs = sides
    index = np.full(ours.tokens.shape, NOWHERE, dtype=np.int32)
    for row, (name, _) in enumerate(known):
        here, there = (np.flatnonzero(side.labels[row] != UNLABELLED) for side in sides)
        if not np.array_equal(ours.labels[row][here], theirs.labels[row][there]):
            said = [tokenizer.decode(side.labels[row][side.labels[row] != UNLABELLED]) for side in sides]
            raise PairError(
                f"conversation {name!r}: the student's rendering counts {said[0]!r}, the teacher's {said[1]!r}. "
                "Choose templates that end answers alike, or the same switch for thoughts."
            )
        index[row, here] = there
    return Rendered(ours, theirs, index)

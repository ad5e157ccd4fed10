"""The second one asked: below a threshold of confidence the teacher answers, and its answer is journalled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stillroom.serving.app import Answer, answers_of
from stillroom.serving.journal import Journal, name_of
from stillroom.serving.questions import Raw, batch_of
from stillroom.serving.routes import TeacherError
from stillroom.types import Model, identity_of


@dataclass(frozen=True, eq=False)
class Cascade:
    """``threshold``: the least confidence with which the student answers itself; above 1 it never does."""

    teacher: Model
    threshold: float
    journal: Journal
    columns: Sequence[Raw]
    classes: Sequence[str]

    def unsure(self, answer: Answer) -> bool:
        """Whether the teacher is asked."""
        return answer.confidence is None or answer.confidence < self.threshold

    @torch.no_grad()
    def answers(self, questions: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The teacher's answers: a question that it answered before is looked up, each new one asked once.

        Raises TeacherError when it cannot be asked; what it answered before is kept.
        """
        new = {name_of(inputs): inputs for inputs in questions if self.journal.get(inputs) is None}
        if new:
            asked = list(new.values())
            try:
                said = answers_of(self.teacher(batch_of(self.columns, asked)), self.classes, "teacher")
            except Exception as error:
                raise TeacherError(f"the teacher could not be asked ({type(error).__name__}): come again.") from error
            pairs = [(inputs, one.probabilities or {}) for inputs, one in zip(asked, said, strict=True)]
            self.journal.add(pairs, identity_of(self.teacher).name)
        return [self._answer(self.journal.get(inputs) or {}) for inputs in questions]

    def _answer(self, shares: Mapping[str, float]) -> Answer:
        best = max(shares, key=shares.__getitem__)
        return Answer(label=best, confidence=shares[best], probabilities=dict(shares), by="teacher")  # type: ignore[call-arg]

"""Rollouts: at which steps of a training the student writes its own batch, from which prompts, and who scores it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillroom import settings
from stillroom.digests import data_description, key_hash
from stillroom.errors import DataError, PairError, UsageError
from stillroom.language import boundaries, is_causal, tokenizer_digest
from stillroom.language.writing import Written, write
from stillroom.objectives import learns
from stillroom.plan import Plan, micro_batches
from stillroom.rollouts.rows import Prompt, Tally, counts_of, prompts_of, rows_of
from stillroom.students.networks import Student
from stillroom.teachers.networks import evaluating
from stillroom.types import Batch, Examples, Model, check_batch_of, identity_of


@dataclass(frozen=True, eq=False)
class Rollouts:
    """On-policy steps of ``fit``: with probability ``share`` a step's batch is written by the student as it is then.

    Agarwal et al. 2023 (GKD, arXiv 2306.13649), algorithm 1: no gradient goes through the writing. ``share`` may move
    over the training, from one number to another: (0.0, 1.0) begins recorded and ends on-policy. Which steps, which
    prompts and every drawn token follow from (plan.seed, step, prompt), so a resumed training is the same training, and
    neither accumulation nor ranks change what is written.

    ``prompts``: packed tokens, one document a row (``pack(..., together=False)``); ``prompt`` says which part of a row:
    'whole', its first so many tokens, or all before the first learned token ('answer', for chats).
    ``teacher`` and ``objective`` of on-policy steps: None means those of fit. The teacher answers what it never saw,
    so it is live or a server. ``writer``: a server that writes instead (``teachers.completions.Completions``); it
    holds the student as it was when it was started, which SampledReverseKL corrects for and other objectives do not.

    Raises UsageError for a setting out of range.
    """

    prompts: Examples = field(repr=False)
    teacher: Model | None = field(default=None, repr=False)
    objective: Any = None
    share: float | tuple[float, float] = 1.0  # of the steps; or at the first and the last step
    prompt: Prompt = "whole"
    new_tokens: int = 64  # at most, per text; what has no end mark by then is counted as truncated
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int | None = None  # texts per optimiser step; None: the plan's
    ends: tuple[int, ...] | None = None  # the ids that end a text; None: the end marks of the student's tokenizer
    writer: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_batch_of(self.prompts)
        if not all(0 <= share <= 1 for share in self._shares):
            raise UsageError(f"rollouts.share={self.share} is a share of the steps: choose numbers from 0 to 1.")
        for name, value in (("new_tokens", self.new_tokens), ("temperature", self.temperature)):
            if not value > 0:
                raise UsageError(f"rollouts.{name} must be above 0, not {value}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"rollouts.top_p={self.top_p} is a share of the mass: choose a number above 0, up to 1.")
        whole_number = isinstance(self.prompt, int) and not isinstance(self.prompt, bool)
        if self.prompt not in ("whole", "answer") and not (whole_number and self.prompt > 0):  # type: ignore[operator]
            raise UsageError(f"rollouts.prompt={self.prompt!r} is unknown: 'whole', 'answer', or a number of tokens.")

    @property
    def _shares(self) -> tuple[float, float]:
        return self.share if isinstance(self.share, tuple) else (self.share, self.share)

    def joined(self, student: Student, teacher: Model | None, objective: Any) -> Rollouts:
        """The rollouts of one training, with nothing left open; ``teacher`` and ``objective`` are those of fit.

        Raises UsageError for a student that cannot write or a teacher that cannot answer new texts, PairError when
        student, teacher and prompts do not share a tokenizer.
        """
        if not is_causal(student.net) or student.tokenizer is None:
            raise UsageError("rollouts need a student that writes: a causal language model with its tokenizer.")
        scorer = self.teacher or teacher
        if scorer is None or hasattr(scorer, "check_data"):
            given = "there is no teacher" if scorer is None else "a recording holds the answers to other texts"
            raise UsageError(f"{given}: what the student writes is scored live. Give Rollouts(..., teacher=...).")
        chosen = self.objective or objective
        if _demanding(chosen):
            raise UsageError(
                f"{chosen} learns, needs features or couples examples: it is for recorded steps. Give "
                "Rollouts(..., objective=...) another."
            )
        ours = tokenizer_digest(student.tokenizer)
        others = {"teacher": identity_of(scorer).tokenizer, "prompts": getattr(self.prompts, "tokenizer", None)}
        for whose, theirs in others.items():
            if theirs is not None and theirs != ours:
                raise PairError(
                    f"the student's tokenizer is {ours[:12]}, that of the {whose} {theirs[:12]}: ids would mean other "
                    "texts on each side. Use one tokenizer for student, teacher and prompts."
                )
        ends = (boundaries(student.tokenizer)[1], student.tokenizer.eos_token_id)
        known = tuple(dict.fromkeys(end for end in ends if end is not None))
        return dataclasses.replace(self, teacher=scorer, objective=chosen, ends=self.ends or known)

    def about(self) -> dict[str, Any]:
        """What student.json says: the settings, the prompts and who scores and writes."""
        return {
            **settings.describe(self),
            "prompts": data_description(self.prompts),
            "teacher": settings.describe(identity_of(self.teacher)),
            "writer": settings.describe(self.writer),
        }

    def due(self, plan: Plan, step: int, total: int) -> bool:
        """Whether a step is on-policy; the same on every rank."""
        first, last = self._shares
        share = first + (last - first) * step / max(1, total - 1)
        return key_hash(f"on-policy|{plan.seed}", step) / 2**64 < share

    def batches(
        self, student: Student, plan: Plan, step: int, rank: int = 0, ranks: int = 1
    ) -> list[tuple[Batch, float]]:
        """What the student writes at a step, as micro-batches with their weights: this rank's part.

        The batches are ``rows.rows_of``. Raises DataError for a prompt that leaves no room in the student's context.
        """
        own = dataclasses.replace(plan, batch_size=self.batch_size or plan.batch_size, views=None)
        with evaluating(student.net):
            return [
                (self._written(student, batch, plan.seed, step), weight)
                for batch, weight in micro_batches(own, self.prompts, step, None, rank, ranks)
            ]

    def _written(self, student: Student, batch: Batch, seed: int, step: int) -> Batch:
        prompts = prompts_of(batch, self.prompt)
        self._check_room(student, batch, prompts)
        names = [f"{name}|step {step}" for name in batch.ids]
        numbers = [key_hash(f"rollout|{seed}|{name}", step) for name in batch.ids]
        texts = self._texts(student, prompts, numbers)
        assert self.ends is not None
        return rows_of(names, prompts, texts, self.ends[0], getattr(self.prompts, "byte_lengths", None))

    def _texts(self, student: Student, prompts: list[list[int]], numbers: list[int]) -> list[Written]:
        assert self.ends is not None
        drawing = {"ends": self.ends, "temperature": self.temperature, "top_p": self.top_p}
        if self.writer is not None:
            return self.writer.write(prompts, numbers, new_tokens=self.new_tokens, **drawing)
        return write(student.net, prompts, _draws(numbers, self.new_tokens), **drawing)

    def _check_room(self, student: Student, batch: Batch, prompts: list[list[int]]) -> None:
        context = getattr(getattr(student.net, "config", None), "max_position_embeddings", None)
        for name, prompt in zip(batch.ids, prompts, strict=True):
            if context is not None and len(prompt) + self.new_tokens > context:
                raise DataError(
                    f"prompt {name!r} has {len(prompt)} tokens: with new_tokens={self.new_tokens} it does not fit the "
                    f"student's context of {context}. Cut it (prompt=a number of tokens), or write fewer."
                )

    counts = staticmethod(counts_of)
    tally = Tally


def _draws(numbers: list[int], count: int) -> Tensor:
    """Uniform numbers [B, count] in [0, 1), a stream of its own for each text."""
    streams = [torch.Generator().manual_seed(number) for number in numbers]
    return torch.stack([torch.rand(count, generator=stream, dtype=torch.float64) for stream in streams])


def _demanding(objective: Any) -> bool:
    features = (getattr(objective, name, ()) for name in ("student_features", "teacher_features"))
    return learns(objective) or any(features) or getattr(objective, "couples_examples", False)

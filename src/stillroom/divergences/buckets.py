"""A (student, teacher) pair as matched log-probabilities: the same M buckets on both sides. Knows no divergence.

Dense teacher: a bucket per id. Sparse teacher: its K entries, one bucket for the whole tail, and one for each id that
only the student has. This is the one place where vocabularies, tails and temperatures are dealt with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.errors import PairError, ShapeError, SignalError, UsageError
from stillroom.types import Dense, Logits, Projected, Sparse

ExtraIds = Literal["zero", "ignore"]
RowFunction = Callable[..., Tensor]  # (log_q [..., M] student, log_p [..., M] teacher, *settings) -> [...]

_ABSENT = float("-inf")


@dataclass(frozen=True)
class Formula:
    """A row function with its settings."""

    function: RowFunction
    settings: tuple[float, ...] = ()
    infinite_at_zero: bool = False  # where the teacher gives probability 0 and the student does not


@dataclass(frozen=True)
class Rows:
    """A formula and how its buckets are formed: (logits [..., V], temperature, *teacher's columns) -> [...].

    Hashable, so that what is compiled for it can be kept; the temperature is an argument, as it may change each step.
    """

    formula: Formula
    kind: Literal["dense", "sparse", "sampled"]
    vocabulary: int  # the teacher's
    extra_ids: ExtraIds

    def __call__(self, logits: Tensor, temperature: Tensor | float, *columns: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.extra_ids == "ignore":
            logits = logits[..., : self.vocabulary]
        if self.kind == "sampled":
            return _mean_over_draws(logits, *columns)
        match = _match_dense if self.kind == "dense" else _match_sparse
        log_q, log_p = match(logits, temperature, self.vocabulary, *columns)
        return self.formula.function(log_q, log_p, *self.formula.settings)


def rows_for(formula: Formula, student: Logits, teacher: Logits, temperature: float, extra_ids: ExtraIds) -> Rows:
    """The rows of a pair, after checking that it is one.

    Raises PairError (vocabularies), ShapeError (positions), SignalError (kinds), UsageError (settings).
    """
    if not temperature > 0:
        raise UsageError(f"temperature={temperature} cannot be used: choose a number above 0.")
    if extra_ids not in ("zero", "ignore"):
        raise UsageError(f"extra_ids={extra_ids!r} is unknown: choose 'zero' or 'ignore'.")
    if not isinstance(student, Dense | Projected):
        raise SignalError(
            f"the student's logits are {type(student).__name__}: a divergence needs all of them. "
            "Let the student give Dense or Projected logits."
        )
    if not isinstance(teacher, Dense | Projected | Sparse):
        raise SignalError(
            f"the teacher's logits are {type(teacher).__name__}: give a Tensor, Dense, Projected or Sparse."
        )
    _check_sizes(student, teacher, extra_ids, formula.infinite_at_zero)
    kind = "dense"
    if isinstance(teacher, Sparse):
        _check_sparse(teacher)
        kind = "sampled" if teacher.sampled else "sparse"
    return Rows(formula, kind, teacher.vocabulary, extra_ids)


def columns_of(teacher: Dense | Sparse) -> tuple[Tensor, ...]:
    """The teacher's tensors as the Rows take them, without gradient."""
    if isinstance(teacher, Dense):
        return (teacher.values.detach(),)
    return teacher.ids.long(), teacher.log_probs.detach(), teacher.rest.detach()


def _check_sizes(student: Dense | Projected, teacher: Logits, extra_ids: ExtraIds, infinite_at_zero: bool) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"the student has positions {list(student.shape)}, the teacher {list(teacher.shape)}: "
            "a divergence compares them one by one."
        )
    ours, theirs = student.vocabulary, teacher.vocabulary
    if ours < theirs:
        raise PairError(
            f"the student's vocabulary has {ours} ids, the teacher's {theirs}: the teacher's mass on the rest would be "
            "lost. Give the student the teacher's vocabulary, or cut the teacher's logits to ids that are truly unused."
        )
    if ours > theirs and extra_ids == "zero" and infinite_at_zero:
        raise PairError(
            f"the student's vocabulary has {ours} ids, the teacher's {theirs}: with probability 0 for the extra ids "
            "this divergence is infinite. Use extra_ids='ignore' (compare over the shared ids), or another divergence."
        )


def _check_sparse(teacher: Sparse) -> None:
    ids, log_probs, rest = teacher.ids.shape, teacher.log_probs.shape, teacher.rest.shape
    if ids != log_probs or (rest != ids[:-1] and not teacher.sampled):
        raise ShapeError(
            f"Sparse logits do not fit together: ids {list(ids)}, log_probs {list(log_probs)}, rest {list(rest)}."
        )


def _match_dense(
    logits: Tensor, temperature: Tensor | float, vocabulary: int, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """The log q and log p [..., V]; ids that only the student has get p = 0."""
    teacher = teacher.to(logits.dtype)
    extra = logits.shape[-1] - vocabulary
    if extra:
        teacher = torch.nn.functional.pad(teacher, (0, extra), value=_ABSENT)
    return (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def _match_sparse(
    logits: Tensor, temperature: Tensor | float, vocabulary: int, ids: Tensor, log_probs: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """The log q and log p [..., K + 1 + extra ids]; without a tail where the K entries are the whole vocabulary.

    The teacher's buckets are normalised here: what a lossy codec gives back sums to 1 only roughly, and a divergence
    between things that are not distributions can be negative. A place that repeats the first id is no entry.
    """
    shared = logits[..., :vocabulary]
    unused = (ids == ids[..., :1]) & (torch.arange(ids.shape[-1], device=ids.device) > 0)
    ours = [shared.gather(-1, ids).masked_fill(unused, _ABSENT)]
    theirs = [log_probs.to(logits.dtype).masked_fill(unused, _ABSENT)]
    if ids.shape[-1] < vocabulary:
        # not log(1 - sum of the kept): that loses every digit when the student is sure of the kept ids
        ours.append(_log_sum_exp(shared.scatter(-1, ids, _ABSENT)).unsqueeze(-1))
        theirs.append(rest.to(logits.dtype).unsqueeze(-1))
    if logits.shape[-1] > vocabulary:
        # one bucket each, not one for all: so that K = V equals Dense at any temperature, for any divergence
        ours.append(logits[..., vocabulary:])
        theirs.append(torch.full_like(logits[..., vocabulary:], _ABSENT))
    # a softmax ignores constants, so tempering bucket logits is tempering bucket log-probabilities
    log_q, log_p = torch.cat(ours, -1) / temperature, torch.cat(theirs, -1) / temperature
    return log_q.log_softmax(-1), log_p.log_softmax(-1)


def _log_sum_exp(values: Tensor) -> Tensor:
    """Over the last dimension; -inf with gradient 0 where all are -inf (torch.logsumexp gives nan there)."""
    top = values.detach().amax(-1, keepdim=True)
    top = torch.where(top == _ABSENT, 0.0, top)
    total = (values - top).exp().sum(-1)
    empty = total == 0
    return torch.where(empty, _ABSENT, torch.where(empty, 1.0, total).log() + top.squeeze(-1))


def _mean_over_draws(logits: Tensor, ids: Tensor, log_probs: Tensor, rest: Tensor) -> Tensor:
    """The mean over draws x ~ P of log p(x) - log q(x): an unbiased estimate of KL(P || Q), and of its gradient."""
    log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    return (log_probs.to(log_q.dtype) - log_q).mean(-1)

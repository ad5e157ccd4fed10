"""What a student is asked to match on tokens that it wrote itself, where the teacher said no more than their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.divergences import cross_entropy
from stillroom.errors import ShapeError, SignalError, UsageError
from stillroom.objectives.matching import where_counted
from stillroom.types import Batch, Logits, Signal, Sparse, as_logits, positions


@dataclass(frozen=True)
class SampledReverseKL:
    """One written token's estimate of KL(student || teacher): w (log q(x) - log p(x)), in nats [...].

    x ~ mu is the written token, q the student now, p the teacher, w = q(x) / mu(x) the ratio to the behaviour that
    wrote it (``batch.extra["behaviour"]``: log mu). The gradient is w (log q(x) - log p(x)) grad log q(x), the factor
    before it held constant. Value and gradient are unbiased for the reverse KL at the position, wherever mu can draw
    all that q can (top_p = 1); at temperature 1 only. What a token does to later positions is not counted (Thinking
    Machines 2025, "On-Policy Distillation"). The gradient of log q(x) - log p(x) itself, without the factor, is 0 on
    average: that is why it is not the loss. Where the teacher gives all its logits, SoftTargets(reverse_kl) has the
    same expectation and no noise.

    ``largest_ratio`` bounds w from above: less noise for a writer far behind, no longer unbiased.
    Term: ``sampled_reverse_kl``. Raises SignalError for a batch that nobody wrote, or a teacher that kept no
    log-probability of a written token; ShapeError where positions do not fit.
    """

    largest_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.largest_ratio is not None and not self.largest_ratio >= 1:
            raise UsageError(f"largest_ratio={self.largest_ratio} cannot be used: choose 1 or more, or None.")

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        if "behaviour" not in batch.extra or batch.labels is None:
            raise SignalError(
                "SampledReverseKL needs tokens that were drawn from the student and their log-probabilities "
                "(batch.extra['behaviour']), and this batch was recorded. Give it to Rollouts(..., objective=...), and "
                "to fit another objective for recorded steps."
            )
        ours = as_logits(student.need_logits("SampledReverseKL"))
        theirs = as_logits(teacher.need_logits("SampledReverseKL"))
        if not ours.shape == theirs.shape == batch.labels.shape:
            shapes = [list(shape) for shape in (ours.shape, theirs.shape, batch.labels.shape)]
            raise ShapeError("student, teacher and labels have positions {}, {} and {}.".format(*shapes))
        device = (ours.hidden if hasattr(ours, "hidden") else ours.values).device  # type: ignore[union-attr]
        labels, behaviour = batch.labels.to(device), batch.extra["behaviour"].to(device)

        def compute(where: Tensor | slice) -> Tensor:
            log_q = -cross_entropy(ours[where], labels[where])
            log_p = _log_prob(theirs[where], labels[where])
            now = log_q.detach()
            ratio = (now - behaviour[where]).exp().clamp(max=self.largest_ratio or math.inf)
            return ratio * (now - log_p) * (1 + log_q - now)  # the last factor is 1, and has the gradient

        return {"sampled_reverse_kl": where_counted(positions(batch, ours.shape, device), compute)}


@torch.no_grad()
def _log_prob(teacher: Logits, labels: Tensor) -> Tensor:
    """The teacher's log p(label) [...]; a Sparse teacher must have kept the label."""
    if not isinstance(teacher, Sparse):
        return -cross_entropy(teacher, labels)
    found = teacher.ids == labels.unsqueeze(-1)
    missing = int((~found.any(-1)).sum())
    if missing:
        raise SignalError(
            f"the teacher kept no log-probability for {missing} of {labels.numel()} written tokens. Score with a live "
            "teacher or a server (teachers.completions keeps the written token), or use SoftTargets(reverse_kl, "
            "temperature=1.0), which has a bucket for all that was not kept."
        )
    return teacher.log_probs.gather(-1, found.int().argmax(-1, keepdim=True)).squeeze(-1)

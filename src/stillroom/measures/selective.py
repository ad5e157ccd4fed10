"""Answering only where a student is sure: a threshold of confidence whose error is bounded, with a stated certainty.

The error among kept answers is R(t) = P(wrong | confidence >= t). On held-out examples, kept(t) of them have at least
confidence t and wrong(t) of these are wrong. For a threshold t that was fixed beforehand, wrong(t) given kept(t) is
binomial, so p(t) = P(Binomial(kept, risk) <= wrong) is a p-value of "R(t) > risk" (the tail that Clopper & Pearson 1934
invert). Thresholds of a fixed grid are tested from strict to loose, in several chains that begin at fixed places, each
chain at level delta / chains and until its first failure: fixed-sequence testing with several starts (Angelopoulos et
al., arXiv 2110.01052, algorithm 1). With probability at least 1 - delta over the held-out examples, every threshold
that passes keeps R(t) <= risk. The question is that of Geifman & El-Yaniv 2017 (arXiv 1705.08500), whose binary search
visits thresholds that depend on the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.errors import DataError, UsageError

CHAINS = 4
# confidence = sigmoid(z) for z from 9 to -3 by quarters, then 0, which keeps every answer; strict to loose
GRID = (*(1 / (1 + math.exp(-(36 - step) / 4)) for step in range(49)), 0.0)


@dataclass(frozen=True)
class Kept:
    """The answers with at least this confidence: how many of ``of``, and how many of them are wrong."""

    threshold: float
    of: int
    kept: int
    wrong: int

    @property
    def share(self) -> float:
        """The share of questions that the student answers itself."""
        return self.kept / self.of

    def upper(self, delta: float) -> float:
        """The Clopper-Pearson upper bound of the error among kept answers, at certainty 1 - ``delta``."""
        if self.kept == 0 or self.wrong >= self.kept:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(self.wrong, self.kept, middle) > delta else (low, middle)
        return high


def at_most(wrong: int, of: int, chance: float) -> float:
    """P(Binomial(of, chance) <= wrong), summed exactly in float64."""
    if chance <= 0 or wrong >= of:
        return 1.0
    if chance >= 1:
        return 0.0
    count = torch.arange(wrong + 1, dtype=torch.float64)
    ways = math.lgamma(of + 1) - torch.lgamma(count + 1) - torch.lgamma(of - count + 1)
    logs = ways + count * math.log(chance) + (of - count) * math.log1p(-chance)
    return min(1.0, float(logs.logsumexp(0).exp()))


def keep_above(confidence: Tensor, wrong: Tensor, threshold: float) -> Kept:
    """What a threshold keeps of answers with ``confidence`` [N] of which ``wrong`` [N] bool are wrong."""
    kept = confidence >= threshold
    return Kept(threshold, len(confidence), int(kept.sum()), int((kept & wrong).sum()))


def choose_threshold(confidence: Tensor, wrong: Tensor, risk: float, delta: float = 0.05) -> Kept | None:
    """The loosest threshold of GRID whose error is at most ``risk`` with certainty 1 - ``delta``; None where none is.

    ``confidence`` [N] in [0, 1] and ``wrong`` [N] bool of examples that nothing was trained or chosen on.
    Raises UsageError for a risk or delta outside 0 to 1, DataError for confidences that are none.
    """
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise UsageError(f"{name}={value} cannot be used: give a number between 0 and 1.")
    if len(confidence) != len(wrong) or not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise DataError("a threshold is chosen on confidences between 0 and 1, one for each example.")
    passed: list[Kept] = []
    for start in range(0, len(GRID), -(-len(GRID) // CHAINS)):
        for threshold in GRID[start:]:
            found = keep_above(confidence, wrong, threshold)
            if found.kept == 0 or at_most(found.wrong, found.kept, risk) > delta / CHAINS:
                break
            passed.append(found)
    return min(passed, key=lambda found: found.threshold, default=None)

"""What a test can find: decoys for a wanted level, and the share of positives that a rank test rejects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.errors import UsageError

Z = 1.959964  # two-sided 95 % of the normal distribution
MOST_DECOYS = 1999


@dataclass(frozen=True)
class Power:
    """The share of known positives that a test rejected, with Wilson's 95 % interval."""

    found: int
    of: int
    alpha: float

    @property
    def value(self) -> float:
        return self.found / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 1927: (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n)."""
        return wilson(self.found, self.of)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


def wilson(found: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Raises UsageError for an empty sample."""
    if of < 1 or not 0 <= found <= of:
        raise UsageError(f"{found} of {of} is no share: give at least one trial.")
    share = found / of
    middle = share + Z * Z / (2 * of)
    half = Z * math.sqrt(share * (1 - share) / of + Z * Z / (4 * of * of))
    low, high = ((middle + sign * half) / (1 + Z * Z / of) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def measured(values: Sequence[float], alpha: float) -> Power:
    """The power at level ``alpha`` from the p-values of positives. Raises UsageError when there are none."""
    if not values:
        raise UsageError("power is measured on at least one self-made positive; there are none.")
    return Power(sum(value <= alpha for value in values), len(values), alpha)


def floor_of(decoys: int) -> float:
    """The smallest p that m decoys (or fresh transcripts) can give: 1 / (m + 1)."""
    return 1 / (decoys + 1)


def fewest(alpha: float, candidates: int = 1) -> int:
    """The fewest decoys whose floor reaches alpha / candidates, Holm's first step: ceil(candidates / alpha) - 1."""
    _check(alpha, "alpha")
    if candidates < 1:
        raise UsageError(f"candidates is {candidates}; at least one teacher is tested.")
    return max(1, math.ceil(candidates / alpha - 1e-9) - 1)


def rank_power(effect: float, decoys: int, alpha: float) -> float:
    """P(p <= alpha) when the teacher's statistic is N(effect, 1) and each decoy's N(0, 1), all independent.

    = integral of P(Binomial(m, P(N > x)) <= floor(alpha (m + 1)) - 1) dN(x; effect, 1). ``effect`` is in standard
    deviations of the decoys, as an audit reports it.
    """
    allowed = math.floor(alpha * (decoys + 1) + 1e-9) - 1
    if allowed < 0:
        return 0.0
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    total = 0.0
    for point, weight in zip(points.tolist(), (weights / weights.sum()).tolist(), strict=True):
        above = 0.5 * math.erfc((effect + point) / math.sqrt(2))
        below = 1 - above
        total += weight * sum(
            math.comb(decoys, k) * above**k * below ** (decoys - k) for k in range(min(allowed, decoys) + 1)
        )
    return min(1.0, total)


@dataclass(frozen=True)
class Design:
    """A plan for an audit: m decoys, n inputs of each set, and the power that is expected of them."""

    alpha: float
    wanted: float
    candidates: int
    effect: float
    rows: int
    decoys: int
    power: float

    @property
    def text(self) -> str:
        """The plan in one sentence."""
        return (
            f"{self.decoys} decoys (p can reach {floor_of(self.decoys):.4f}; {self.alpha:g} over {self.candidates} "
            f"candidate(s) needs {self.alpha / self.candidates:.4f}) and {self.rows} inputs of each set: expected "
            f"power {self.power:.2f} at an effect of {self.effect:.2f} decoy standard deviations."
        )


def design(
    effect: float, *, measured_on: int = 1000, alpha: float = 0.05, power: float = 0.95, candidates: int = 1
) -> Design:
    """The fewest decoys, then the fewest inputs, for a wanted level and power.

    ``effect``: decoy standard deviations, from a pilot with ``measured_on`` inputs of each set (an audit prints it).
    More inputs are assumed to sharpen it by sqrt(n / measured_on): the noise of a statistic that is a mean over inputs.
    That is a plan, not a promise: the power of the audit itself is measured on self-made positives. Raises UsageError
    for settings out of range, and for an effect that no more than eight times as many inputs could bring out.
    """
    _check(alpha, "alpha")
    _check(power, "power")
    if effect <= 0 or measured_on < 1:
        raise UsageError(f"effect {effect} on {measured_on} inputs: both must be above 0.")
    least = fewest(alpha, candidates)
    # a decoy is a training, an input a question: more inputs come first
    for decoys in (least, 2 * least + 1, 5 * (least + 1) - 1):
        for factor in (1, 1.5, 2, 3, 4, 6, 8):
            sharper = effect * math.sqrt(factor)
            expected = rank_power(sharper, decoys, alpha / candidates) if decoys <= MOST_DECOYS else 0.0
            if expected >= power:
                rows = math.ceil(measured_on * factor)
                return Design(alpha, power, candidates, sharper, rows, decoys, expected)
    raise UsageError(
        f"an effect of {effect} is too small: 8 times as many inputs and {5 * (least + 1) - 1} decoys would not reach "
        f"power {power}. Find inputs nearer to the declared ones, or accept a lower power."
    )


def _check(share: float, name: str) -> None:
    if not 0 < share < 1:
        raise UsageError(f"{name} is {share}; it is a share between 0 and 1, such as 0.05.")

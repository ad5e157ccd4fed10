"""Exact p-values of a rank among exchangeable values, and Holm's correction over several tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stillroom.errors import UsageError

DIGITS = 10  # statistics are compared to so many decimals: sums in another order must not break a tie


def exact_p(value: float, others: np.ndarray) -> float:
    """p = (1 + #{others >= value}) / (m + 1): the share of m + 1 exchangeable values that are at least ``value``.

    Exact: P(p <= a) <= a for every a when all m + 1 values are exchangeable, whatever their distribution (Phipson and
    Smyth 2010, "Permutation p-values should never be zero"). It is never below 1 / (m + 1). Raises UsageError without
    others, or for a value that is not finite.
    """
    value, others = _comparable(value, others)
    return (1 + int((others >= value).sum())) / (len(others) + 1)


def randomised_p(value: float, others: np.ndarray, seed: int) -> float:
    """p = (#{others > value} + U (1 + #{others = value})) / (m + 1), U uniform on (0, 1) and drawn from ``seed``.

    Exactly uniform under exchangeability, ties included: what a calibration compares with the uniform distribution.
    Raises what ``exact_p`` raises.
    """
    value, others = _comparable(value, others)
    above, level = int((others > value).sum()), int((others == value).sum())
    return float((above + np.random.default_rng(seed).random() * (1 + level)) / (len(others) + 1))


def holm(values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p-values in the order given: p(i) becomes max over j <= i of min(1, (k - j + 1) p(j)), sorted upwards.

    Rejecting those at most a keeps the chance of any false rejection at a, however the k tests depend on each other
    (Holm 1979, "A simple sequentially rejective multiple test procedure").
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def _comparable(value: float, others: np.ndarray) -> tuple[float, np.ndarray]:
    others = np.asarray(others, dtype=np.float64)
    if others.ndim != 1 or not len(others):
        raise UsageError("a rank needs at least one other value to compare with; without decoys there is no p-value.")
    if not (np.isfinite(value) and np.isfinite(others).all()):
        raise UsageError("a statistic is NaN or infinite, so it has no rank. Check the answers.")
    return float(np.round(value, DIGITS)), np.round(others, DIGITS)

"""How sure a number is: the percentile bootstrap over examples, and over seeds where there are several.

A number is ``finish(statistics)``; a resample of it is ``finish`` of resampled rows. So every metric is treated alike.
Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile intervals).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import ShapeError

Finish = Callable[[Tensor], float]
Statistics = np.ndarray | Tensor | Sequence[Tensor] | Sequence[np.ndarray]  # [R, N, S], or R arrays [N, S]

_CHUNK = 1 << 22  # drawn indices held at once, whatever the number of examples
_TAIL = 0.025  # each side of a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval, in the number's own unit. An exact number has low = high = value."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value, value, value)

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap(statistics: Statistics, finish: Finish, replicates: int = 1000, seed: int = 0) -> Interval | None:
    """``finish`` of all rows of all seeds, with a 95 % interval. statistics [R seeds, N examples, S].

    Each replicate draws N examples with replacement, the same for every seed, and R seeds where R > 1. Rows that hold
    a NaN in any seed do not count. None when no row is left, or when the number itself is not finite.
    """
    (rows,) = _clean(statistics)
    if rows.shape[1] == 0:
        return None
    value = _finish_all(rows, finish)
    if not math.isfinite(value):
        return None
    drawn = np.concatenate(
        [_resampled(rows, finish, *draw) for draw in _draws(rows.shape[1], [len(rows)], replicates, seed)]
    )
    return Interval(value, *_percentiles(drawn, value))


def paired_bootstrap(
    first: Statistics, second: Statistics, finish: Finish, replicates: int = 1000, seed: int = 0
) -> Interval | None:
    """finish(first) - finish(second) with a 95 % interval. first [R, N, S], second [R', N, S], the same N examples.

    Both sides see the same drawn examples, and the same drawn seeds when R = R' (seeds are pairs); so what is common
    to both cancels: identical models differ by exactly 0. Rows with a NaN on either side do not count.
    Raises ShapeError when the examples differ in number.
    """
    ours, theirs = _clean(first, second)
    if ours.shape[1] == 0:
        return None
    value = _finish_all(ours, finish) - _finish_all(theirs, finish)
    if not math.isfinite(value):
        return None
    counts = [len(ours), len(theirs)]
    drawn = [
        _resampled(ours, finish, examples, seeds[0]) - _resampled(theirs, finish, examples, seeds[1])
        for examples, *seeds in _draws(ours.shape[1], counts, replicates, seed)
    ]
    return Interval(value, *_percentiles(np.concatenate(drawn), value))


def median_interval(values: Sequence[float], replicates: int = 1000, seed: int = 0) -> Interval:
    """The median of some numbers with its bootstrapped 95 % interval."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(replicates, len(array)))
    middle = float(np.median(array))
    return Interval(middle, *_percentiles(np.median(array[draws], axis=1), middle))


def _clean(*sides: Statistics) -> list[np.ndarray]:
    """Each side as float64 [R, N, S], without the rows that hold a NaN on any side."""
    arrays = [np.stack([np.asarray(part, dtype=np.float64) for part in side]) for side in sides]
    for array in arrays:
        if array.ndim != 3 or array.shape[1] != arrays[0].shape[1]:
            shapes = [list(a.shape) for a in arrays]
            raise ShapeError(
                f"statistics have shapes {shapes}; expected [seeds, examples, statistics], equal examples."
            )
    whole = np.ones(arrays[0].shape[1], dtype=bool)
    for array in arrays:
        whole &= ~np.isnan(array).any(axis=(0, 2))
    return [array[:, whole] for array in arrays]


def _draws(examples: int, seed_counts: list[int], replicates: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Chunks of [examples drawn [k, N], then the seeds drawn [k, R] of each side]; equal counts draw equal seeds."""
    for_examples = np.random.default_rng([seed, 0])
    for_seeds = [np.random.default_rng([seed, 1]) for _ in seed_counts]
    size = max(1, _CHUNK // examples)
    for start in range(0, replicates, size):
        k = min(size, replicates - start)
        chosen = [rng.integers(count, size=(k, count)) for rng, count in zip(for_seeds, seed_counts, strict=True)]
        yield [for_examples.integers(examples, size=(k, examples)), *chosen]


def _resampled(rows: np.ndarray, finish: Finish, examples: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """``finish`` of each replicate [k]. One that is a function of column sums needs no loop: a matrix product."""
    of_sums = getattr(finish, "of_sums", None)
    if of_sums is None:
        pairs = zip(examples, seeds, strict=True)
        return np.array([_finish_all(rows[chosen][:, index], finish) for index, chosen in pairs])
    count, (k, size) = len(rows), examples.shape
    shifted = examples + np.arange(k)[:, None] * size
    times = np.bincount(shifted.ravel(), minlength=k * size).reshape(k, size).astype(np.float64)
    sums = np.stack([times @ one for one in rows], axis=1)  # [k, R, S]
    seed_times = (seeds[:, :, None] == np.arange(count)).sum(axis=1)  # [k, R]
    return np.asarray(of_sums((sums * seed_times[:, :, None]).sum(axis=1)))


def _finish_all(rows: np.ndarray, finish: Finish) -> float:
    return float(finish(torch.from_numpy(np.ascontiguousarray(rows.reshape(-1, rows.shape[-1])))))


def _percentiles(drawn: np.ndarray, value: float) -> tuple[float, float]:
    """The middle 95 % of the finite replicates; the number itself when there are none."""
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0:
        return value, value
    low, high = np.quantile(drawn, [_TAIL, 1 - _TAIL])
    return float(low), float(high)

"""How like a student is to each column of answers (a candidate teacher and its decoys), symmetric in the columns.

A column is one model's answers on fixed inputs. M columns, n inputs, C classes. Every statistic below treats all M
columns alike, so if the columns are exchangeable given the student, so are the M statistics. That alone makes the rank
of one of them an exact test; nothing is assumed about the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stillroom.errors import UsageError

Mode = Literal["soft", "hard"]
MODES: dict[Mode, str] = {
    "soft": "COMB: the largest of residual cosine and agreement on declared and fresh inputs, standardised",
    "hard": "agreement on declared inputs",
}
DECLARED, FRESH = "declared", "fresh"
FLOOR = 0.01  # nats, added to a coordinate's standard deviation: one where all columns agree must not dominate
NOTHING = 1e-9  # a residual this small is rounding, and has no direction
LOWEST = -20.0  # nats: log-probabilities below are cut, so that one of -inf does not swallow the rest


@dataclass(frozen=True, eq=False)
class Rows:
    """A statistic as sums over inputs, so that inputs can be weighted anew (bootstrap) without another pass.

    value [..., M] = over @ w / sqrt(own @ w * square @ w) for weights w [..., n]; an agreement has own = square = 1.
    """

    over: np.ndarray  # [M, n]
    own: np.ndarray  # [n]
    square: np.ndarray  # [M, n]

    def value(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[M] with all inputs once, or [R, M] for ``weights`` [R, n]; 0 where nothing differs between columns."""
        if weights is None:  # plain sums along the last axis: equal columns give equal bits
            over, size = self.over.sum(-1), np.sqrt(self.own.sum() * self.square.sum(-1))
        else:
            over = weights @ self.over.T
            size = np.sqrt((weights @ self.own)[:, None] * (weights @ self.square.T))
        return np.divide(over, size, out=np.zeros_like(over), where=size > NOTHING)


def residual(student: np.ndarray, columns: np.ndarray) -> Rows:
    """r(t) = cosine of (student - mean column) and (column t - mean column), each coordinate / its column sd.

    Coordinates are centred log-probabilities (n x C). ``student`` [n, C] and ``columns`` [M, n, C] in nats. What all
    columns share (the task, the data, the recipe) is taken away; what is left is what a seed did.
    """
    own, all_of_them = _centred(student), _centred(columns)
    mean, spread = all_of_them.mean(0), all_of_them.std(0) + FLOOR
    left, right = (own - mean) / spread, (all_of_them - mean) / spread
    return Rows((left * right).sum(-1), (left * left).sum(-1), (right * right).sum(-1))


def agreement(student: np.ndarray, columns: np.ndarray) -> Rows:
    """a(t) = share of the inputs on which the student and column t have the same top class.

    ``student`` [n] class numbers or [n, C] scores; ``columns`` [M, n] or [M, n, C].
    """
    said = student if student.ndim == 1 else student.argmax(-1)
    columns = columns if columns.ndim == 2 else columns.argmax(-1)
    same = (columns == said).astype(np.float64)
    return Rows(same, np.ones(same.shape[1]), np.ones_like(same))


def statistics_of(student: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray], mode: Mode) -> list[Rows]:
    """The statistics of a mode, which is chosen before the student is asked.

    soft: residual and agreement on every set of inputs. hard: agreement on the declared inputs alone, which is the
    stronger statistic for a student of hard labels (.94 to .98 of positives found against .86 by COMB, and about none
    on fresh inputs: docs/decisions/0018). Raises UsageError for a set of inputs that is missing or shaped otherwise.
    """
    names = [DECLARED] if mode == "hard" else [DECLARED, FRESH]
    for name in names:
        if name not in student or name not in columns:
            raise UsageError(f"mode {mode!r} needs answers on {name!r} inputs; given: {', '.join(sorted(columns))}.")
        if mode == "soft" and (student[name].ndim != 2 or columns[name].ndim != 3):
            raise UsageError("mode 'soft' needs log-probabilities [n, C]; with class numbers alone choose mode 'hard'.")
        if student[name].shape[0] != columns[name].shape[1]:
            raise UsageError(
                f"the student answered {student[name].shape[0]} {name} inputs, the teachers {columns[name].shape[1]}: "
                "all must answer the same ones."
            )
    if mode == "hard":
        return [agreement(student[DECLARED], columns[DECLARED])]
    return [statistic(student[name], columns[name]) for name in names for statistic in (residual, agreement)]


def combined(values: np.ndarray) -> np.ndarray:
    """T(t) = max over statistics of (value - mean over columns) / sd over columns; [..., K, M] -> [..., M].

    One statistic is returned standardised, which keeps its ranks. A statistic that is the same for all columns gives 0.
    """
    middle, spread = values.mean(-1, keepdims=True), values.std(-1, keepdims=True)
    return np.divide(values - middle, spread, out=np.zeros_like(values), where=spread > 1e-12).max(-2)


def effect(values: np.ndarray) -> np.ndarray:
    """How many standard deviations of its decoys column 0 lies above their mean; [..., M] -> [...]."""
    decoys = values[..., 1:]
    spread = decoys.std(-1, ddof=1) if decoys.shape[-1] > 1 else np.zeros(values.shape[:-1])
    return (values[..., 0] - decoys.mean(-1)) / np.maximum(spread, 1e-12)


def _centred(log_probs: np.ndarray) -> np.ndarray:
    cut = np.maximum(np.asarray(log_probs, dtype=np.float64), LOWEST)
    return cut - cut.mean(-1, keepdims=True)

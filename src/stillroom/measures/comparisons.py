"""The student against the other rows, on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.measures.asking import Asked, Seeds
from stillroom.measures.bootstrap import paired_bootstrap
from stillroom.measures.wording import in_order
from stillroom.types import Metric


def comparisons_of(
    rows: Mapping[str, Seeds], asked: Asked, metrics: Sequence[Metric], replicates: int, seed: int
) -> list[dict[str, Any]]:
    """The student against every other row but the teacher, the headline first; positive when the student is better.

    [{"better": "student", "worse": row, "metric", "seeds", "difference", "low", "high"}], paired over the examples.
    """
    others = [row for row in in_order(rows) if row not in ("student", "teacher")]
    pairs = (_compared(rows, asked, metric, other, replicates, seed) for metric in metrics for other in others)
    return [pair for pair in pairs if pair is not None]


def _compared(
    rows: Mapping[str, Seeds], asked: Asked, metric: Metric, other: str, replicates: int, seed: int
) -> dict[str, Any] | None:
    ours, theirs = (asked.independent(row, metric) for row in ("student", other))
    gap = None if ours is None or theirs is None else paired_bootstrap(ours, theirs, metric.finish, replicates, seed)
    if gap is None:
        return None
    low, value, high = gap.low, gap.value, gap.high
    if metric.higher_is_better is False:
        low, value, high = 0.0 - high, 0.0 - value, 0.0 - low
    seeds = min(len(rows["student"]), len(rows[other]))
    pair = {"better": "student", "worse": other, "metric": metric.name, "seeds": seeds}
    return {**pair, "difference": value, "low": low, "high": high}

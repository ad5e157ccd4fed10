"""The metrics by name, and which ones a task gets when nobody chooses."""

from __future__ import annotations

from stillroom.divergences import forward_kl, total_variation
from stillroom.measures.classification import (
    Against,
    agrees,
    calibration_error,
    confidence_and_correct,
    correct,
    macro_f1,
    predicted_and_label,
    surprise,
)
from stillroom.measures.regression import (
    absolute_error,
    answers_and_labels,
    distance_to_teacher,
    largest,
    r2,
    squared_error,
    worst_error,
)
from stillroom.measures.sums import RatioOfSums
from stillroom.types import Batch, Metric, Signal

_MEAN = RatioOfSums()

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("accuracy", correct, _MEAN),
        Metric("macro_f1", predicted_and_label, macro_f1),
        Metric("nll", surprise, _MEAN, higher_is_better=False, needs_probabilities=True, unit="nats"),
        Metric("perplexity", surprise, RatioOfSums("exp"), higher_is_better=False, needs_probabilities=True),
        Metric(
            "calibration_error",
            confidence_and_correct,
            calibration_error,
            higher_is_better=False,
            needs_probabilities=True,
        ),
        Metric("agreement", agrees, _MEAN, against_teacher=True),
        Metric(
            "kl",
            Against(forward_kl),
            _MEAN,
            higher_is_better=False,
            against_teacher=True,
            needs_probabilities=True,
            unit="nats",
        ),
        Metric(
            "total_variation",
            Against(total_variation),
            _MEAN,
            higher_is_better=False,
            against_teacher=True,
            needs_probabilities=True,
        ),
        Metric("r2", answers_and_labels, r2),
        Metric("mae", absolute_error, _MEAN, higher_is_better=False),
        Metric("rmse", squared_error, RatioOfSums("sqrt"), higher_is_better=False),
        Metric("largest_error", worst_error, largest, higher_is_better=False),
        Metric("teacher_distance", distance_to_teacher, _MEAN, higher_is_better=False, against_teacher=True),
    )
}


def classification_metrics() -> tuple[Metric, ...]:
    """For one class per example: labels [B] int64, logits [B, V]."""
    names = ("accuracy", "macro_f1", "nll", "calibration_error", "agreement", "kl", "total_variation")
    return tuple(METRICS[name] for name in names)


def sequence_metrics() -> tuple[Metric, ...]:
    """For one class per position: labels [B, T] int64, logits [B, T, V]."""
    names = ("perplexity", "nll", "accuracy", "agreement", "kl", "total_variation")
    return tuple(METRICS[name] for name in names)


def regression_metrics() -> tuple[Metric, ...]:
    """For numbers: labels [B] or [B, D] float, values of the same size."""
    return tuple(METRICS[name] for name in ("r2", "mae", "rmse", "largest_error", "teacher_distance"))


def default_metrics(teacher: Signal, batch: Batch) -> tuple[Metric, ...]:
    """By the labels' dtype and shape, and by what the teacher answers; without those that cannot be had.

    Without labels, only those against the teacher.
    """
    numbers = teacher.logits is None if batch.labels is None else batch.labels.is_floating_point()
    if numbers:
        chosen, compares = regression_metrics(), teacher.values is not None
    else:
        several = batch.labels is not None and batch.labels.ndim > 1
        chosen, compares = sequence_metrics() if several else classification_metrics(), teacher.logits is not None
    return tuple(m for m in chosen if (compares if m.against_teacher else batch.labels is not None))

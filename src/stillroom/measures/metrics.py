"""The metrics by name, and which ones a task gets when nobody chooses."""

from __future__ import annotations

from stillroom.divergences import forward_kl, total_variation
from stillroom.measures.actions import ActionError
from stillroom.measures.classification import (
    Against,
    CalibrationError,
    agrees,
    agrees_within_few,
    confidence_bins,
    correct,
    macro_f1,
    predicted_and_label,
    surprise,
)
from stillroom.measures.language import nats_and_bytes
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
            "bits_per_byte",
            nats_and_bytes,
            RatioOfSums("bits"),
            higher_is_better=False,
            needs_probabilities=True,
            unit="bits",
        ),
        Metric(
            "calibration_error",
            confidence_bins,
            CalibrationError(),
            higher_is_better=False,
            needs_probabilities=True,
        ),
        Metric("agreement", agrees, _MEAN, against_teacher=True),
        Metric("top5_agreement", agrees_within_few, _MEAN, against_teacher=True),
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
        Metric("action_error", ActionError(), _MEAN, higher_is_better=False, against_teacher=True),
        Metric("largest_action_error", ActionError(worst=True), largest, higher_is_better=False, against_teacher=True),
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


def language_metrics() -> tuple[Metric, ...]:
    """For the next token of a text: labels [B, T] int64, logits [B, T, V], extra["bytes"] [B, T]."""
    names = ("bits_per_byte", "perplexity", "accuracy", "agreement", "top5_agreement", "kl", "calibration_error")
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
        per_position = language_metrics if "bytes" in batch.extra else sequence_metrics
        chosen, compares = per_position() if several else classification_metrics(), teacher.logits is not None
    return tuple(m for m in chosen if (compares if m.against_teacher else batch.labels is not None))

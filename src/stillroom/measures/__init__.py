"""The numbers of a report: quality, fidelity, calibration, cost, and how sure they are. Knows no stage and no file."""

from stillroom.measures.actions import action_metrics
from stillroom.measures.bootstrap import Interval, bootstrap, paired_bootstrap
from stillroom.measures.cost import flops_per_example, latency, networks_of, parameter_count, weight_bytes
from stillroom.measures.diagnosis import diagnose
from stillroom.measures.language import bits_per_byte_of_texts, nats_and_bytes_of_texts
from stillroom.measures.metrics import (
    METRICS,
    classification_metrics,
    default_metrics,
    language_metrics,
    regression_metrics,
    sequence_metrics,
)
from stillroom.measures.reading import entropy_of, label_log_probs, top_of
from stillroom.measures.sums import RatioOfSums

__all__ = [
    "METRICS",
    "Interval",
    "RatioOfSums",
    "action_metrics",
    "bits_per_byte_of_texts",
    "bootstrap",
    "classification_metrics",
    "default_metrics",
    "diagnose",
    "entropy_of",
    "flops_per_example",
    "label_log_probs",
    "language_metrics",
    "latency",
    "nats_and_bytes_of_texts",
    "networks_of",
    "paired_bootstrap",
    "parameter_count",
    "regression_metrics",
    "sequence_metrics",
    "top_of",
    "weight_bytes",
]

"""What a student is asked to match: (student, teacher, batch) -> named values, one per position, never averaged.

matching.py: targets, labels, values and mixtures, and how positions become one number; features.py: hidden states and
relations; actions.py: what a policy does; across.py: another tokenizer's teacher; on_policy.py: texts that the student
wrote.
"""

from stillroom.objectives.across import AlignedTargets, SpanLikelihood, UniversalLogits
from stillroom.objectives.actions import MatchActions, MatchGaussians
from stillroom.objectives.columns import MatchColumns
from stillroom.objectives.features import MatchFeatures, MatchRelations
from stillroom.objectives.matching import (
    HardLabels,
    MatchValues,
    Mix,
    SoftTargets,
    built,
    counted_positions,
    learns,
    masked_mean,
    position_weights,
    weighted_sum,
    where_counted,
)
from stillroom.objectives.on_policy import SampledReverseKL

__all__ = [
    "AlignedTargets",
    "HardLabels",
    "MatchActions",
    "MatchColumns",
    "MatchFeatures",
    "MatchGaussians",
    "MatchRelations",
    "MatchValues",
    "Mix",
    "SampledReverseKL",
    "SoftTargets",
    "SpanLikelihood",
    "UniversalLogits",
    "built",
    "counted_positions",
    "learns",
    "masked_mean",
    "position_weights",
    "weighted_sum",
    "where_counted",
]

"""Mathematics on logits, per position: the divergences, and how they run without the logits being materialised.

logits.py holds the divergences themselves; formulas.py their formulas; buckets.py how a sparse teacher is compared;
projection.py, matmuls.py and row_steps.py walk through head x hidden states in chunks.
"""

from stillroom.divergences.logits import (
    DIVERGENCES,
    Bound,
    Divergence,
    alpha_beta,
    bind,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    total_variation,
)
from stillroom.divergences.projection import EXACT, Arithmetic

__all__ = [
    "DIVERGENCES",
    "EXACT",
    "Arithmetic",
    "Bound",
    "Divergence",
    "alpha_beta",
    "bind",
    "cross_entropy",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_kl",
    "total_variation",
]

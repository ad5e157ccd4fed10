"""The transcript-resampling rank test: did a student learn from this very transcript of a teacher's draws?

H0: given the teacher and the prompts, the student is independent of which draw the declared transcript was. Then the
transcript y and K fresh ones are exchangeable given the student, and p = (1 + #{L(y_k) >= L(y)}) / (K + 1) is exact,
L(y) the student's log-likelihood. There is no shift between the two sides, which is where membership inference errs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.errors import PairError, UsageError
from stillroom.provenance.audit.power import Power, fewest, floor_of
from stillroom.provenance.audit.ranks import exact_p, randomised_p


@dataclass(frozen=True)
class TranscriptEvidence:
    """What the test of one transcript found; ``distance`` is (L(y) - mean) / sd over the fresh transcripts."""

    student: str
    transcript: str
    alpha: float
    fresh: int
    p: float
    distance: float
    randomised: float | None = None
    power: Power | None = None
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rejected(self) -> bool:
        return self.p <= self.alpha

    def with_power(self, power: Power) -> TranscriptEvidence:
        """The same result with the power of this test, as measured on positives made for it."""
        return dataclasses.replace(self, power=power)

    @property
    def text(self) -> str:
        """The result in words. Raises UsageError for a non-rejection without its power."""
        numbers = (
            f"p = {self.p:.4f} (exact, {self.fresh} fresh transcripts, floor {floor_of(self.fresh):.4f}), "
            f"{self.distance:+.1f} standard deviations of their log-likelihoods"
        )
        if self.rejected:
            return f"evidence that {self.student} learned from {self.transcript}: {numbers}"
        if self.power is None:
            raise UsageError(
                f"p = {self.p:.4f} rejects nothing, and that says something only beside the power of the test. "
                "Measure it on self-made positives (power.measured) and give it by with_power."
            )
        return f"no evidence at power {self.power} that {self.student} learned from {self.transcript}: {numbers}"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON: the fields, and the text."""
        power = None
        if self.power is not None:
            low, high = self.power.interval
            power = {"value": self.power.value, "low": low, "high": high, "positives": self.power.of}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {
            "inputs": dict(self.inputs),
            "power": power,
            "statistic": "log-likelihood of the declared transcript among fresh ones",
            "rejected": self.rejected,
            "text": self.text,
        }


def transcript_test(
    declared: float,
    fresh: np.ndarray,
    *,
    name: str = "the student",
    transcript: str = "the declared transcript",
    alpha: float = 0.05,
    randomise: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> TranscriptEvidence:
    """Rank ``declared`` = L(y) among ``fresh`` [K] = L(y_1) .. L(y_K), log-likelihoods in nats under the student.

    The fresh transcripts come from the same teacher, revision, prompts, temperature and number of draws. Raises
    PairError when they are all the same, as a teacher without randomness gives; UsageError for K so small that p could
    not reach ``alpha``.
    """
    fresh = np.asarray(fresh, dtype=np.float64)
    needed = fewest(alpha)
    if len(fresh) < needed:
        raise UsageError(
            f"{len(fresh)} fresh transcripts give p >= {floor_of(len(fresh)):.4f}, which can never reach {alpha:g}. "
            f"Draw at least {needed}."
        )
    if float(np.ptp(fresh)) == 0.0:
        raise deterministic(transcript)
    spread = float(fresh.std(ddof=1))
    return TranscriptEvidence(
        student=name,
        transcript=transcript,
        alpha=alpha,
        fresh=len(fresh),
        p=exact_p(declared, fresh),
        distance=(float(declared) - float(fresh.mean())) / spread,
        randomised=None if randomise is None else randomised_p(declared, fresh, randomise),
        inputs=inputs or {},
    )


def deterministic(transcript: str) -> PairError:
    """The error for answers that do not vary: there is nothing to draw again."""
    return PairError(
        f"{transcript} holds answers that were not drawn at random (probabilities, or the likeliest label): asked "
        "again the teacher says the same, and no rank follows. Use a committed random half-split: before training, "
        "publish the digest of a random half of the prompts, train on it alone, and compare the two halves; or test "
        "the teacher (stillroom audit teacher)."
    )

"""The exchangeable-decoy rank test: does a student's likeness single out this teacher among others of its recipe?

H0: given the teacher's recipe (all but the seed), the student is independent of what the teacher's own seed did. Then
the teacher and its decoys (the same recipe, other seeds) are exchangeable given the student, and the rank of the
teacher's statistic among theirs is uniform: p is exact. A student of the truth, of the same data, or of another teacher
of the recipe satisfies H0. (docs/decisions/0018; baselines by Nikolic et al. 2025, arXiv 2502.00706, are not
exchangeable, and their randomness over prompts alone rejects too often.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.errors import UsageError
from stillroom.provenance.audit.decoys import Columns, check_columns
from stillroom.provenance.audit.power import Power, fewest, floor_of
from stillroom.provenance.audit.ranks import exact_p, holm, randomised_p
from stillroom.provenance.audit.statistics import MODES, Mode, Rows, combined, effect, statistics_of

REPLICATES = 400
COMPARATIVE = "comparative, no controlled error rate"


@dataclass(frozen=True)
class TeacherEvidence:
    """What a test of one candidate teacher found. ``text`` says it; ``as_json`` is the body of a claim.

    ``p`` is exact and never below 1 / (decoys + 1); ``adjusted`` is Holm's over all candidates; both are None without
    decoys. ``effect`` (value, low, high): decoy standard deviations above their mean, 95 % bootstrap over inputs.
    ``likeness``: each statistic of the teacher as it is, before standardising. ``caution``: what else could explain it.
    """

    teacher: str
    student: str
    mode: Mode
    alpha: float
    decoys: int
    likeness: Mapping[str, float]
    p: float | None = None
    adjusted: float | None = None
    randomised: float | None = None
    candidates: int = 1
    effect: tuple[float, float, float] | None = None
    power: Power | None = None
    recipe: str | None = None
    caution: str | None = None
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rejected(self) -> bool:
        """Whether independence of the teacher's seed is rejected at ``alpha`` over all candidates."""
        return self.adjusted is not None and self.adjusted <= self.alpha

    def with_power(self, power: Power) -> TeacherEvidence:
        """The same result with the power of this test, as measured on positives made for it."""
        return dataclasses.replace(self, power=power)

    @property
    def text(self) -> str:
        """The result in words. Raises UsageError for a non-rejection without its power: it would say too much."""
        if self.p is None or self.adjusted is None or self.effect is None:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in self.likeness.items())
            return f"{self.student} and {self.teacher}: {shown}. evidence: {COMPARATIVE}"
        several = f", {self.adjusted:.4f} by Holm over {self.candidates} candidates" if self.candidates > 1 else ""
        size = "effect {:.1f} [{:.1f}, {:.1f}] decoy standard deviations".format(*self.effect)
        numbers = f"p = {self.p:.4f}{several} (exact, {self.decoys} decoys, floor {floor_of(self.decoys):.4f}), {size}"
        if self.caution is not None:
            numbers = f"{numbers}; caution: {self.caution}"
        if self.rejected:
            found = f"evidence that {self.student} learned from {self.teacher}: {numbers}"
            return found if self.power is None else f"{found}; power {self.power}"
        if self.power is None:
            raise UsageError(
                f"p = {self.p:.4f} rejects nothing, and that says something only beside the power of the test. "
                "Measure it on self-made positives (power.measured) and give it by with_power."
            )
        return f"no evidence at power {self.power} that {self.student} learned from {self.teacher}: {numbers}"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON: the fields, the statistic in words, and the text."""
        power = None
        if self.power is not None:
            low, high = self.power.interval
            power = {"value": self.power.value, "low": low, "high": high, "positives": self.power.of}
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "power"},
            "likeness": dict(self.likeness),
            "inputs": dict(self.inputs),
            "effect": None if self.effect is None else dict(zip(("value", "low", "high"), self.effect, strict=True)),
            "power": power,
            "statistic": MODES[self.mode],
            "evidence": COMPARATIVE if self.p is None else "exact rank among exchangeable decoys",
            "rejected": self.rejected,
            "text": self.text,
        }


def teacher_test(
    student: Mapping[str, np.ndarray],
    columns: Columns,
    mode: Mode = "soft",
    *,
    name: str = "the student",
    alpha: float = 0.05,
    randomise: int | None = None,
    replicates: int = REPLICATES,
    inputs: Mapping[str, Any] | None = None,
) -> TeacherEvidence:
    """Test one candidate teacher. ``student``: its answers on the inputs that ``columns`` answered.

    ``mode`` is chosen before the student is asked: 'soft' where it may have learned from probabilities, 'hard' where
    from labels (statistics.MODES). ``randomise``: a seed, to add the randomised p. ``replicates``: bootstrap samples of
    the inputs, for the effect's interval. ``inputs``: what was fixed beforehand (digests), passed on to the result.

    Without decoys there is no p-value. Raises what ``check_columns`` and ``statistics_of`` raise, and UsageError for
    decoys so few that p could not reach ``alpha``, or an unknown mode.
    """
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is unknown; choose {' or '.join(MODES)}.")
    check_columns(columns)
    rows = statistics_of(student, columns.answers, mode)
    values = np.stack([statistic.value() for statistic in rows])
    known: dict[str, Any] = {
        "teacher": columns.teacher,
        "student": name,
        "mode": mode,
        "alpha": alpha,
        "decoys": columns.decoys,
        "likeness": _likeness(mode, values[:, 0].tolist(), columns.decoys),
        "recipe": columns.recipes[0],
        "inputs": inputs or {},
    }
    if not columns.decoys:
        return TeacherEvidence(**known)
    _check_floor(columns.decoys, alpha, 1)
    whole = combined(values)
    p = exact_p(whole[0], whole[1:])
    return TeacherEvidence(
        **known,
        p=p,
        adjusted=p,
        randomised=None if randomise is None else randomised_p(whole[0], whole[1:], randomise),
        effect=(float(effect(whole)), *_interval(rows, replicates)),
    )


def over_candidates(found: Sequence[TeacherEvidence]) -> tuple[TeacherEvidence, ...]:
    """The same results with Holm's p over all candidate teachers of one student. Results without p stay as they are.

    Raises UsageError when a candidate has too few decoys to reach its share of alpha.
    """
    tested = [one for one in found if one.p is not None]
    for one in tested:
        _check_floor(one.decoys, one.alpha, len(tested))
    adjusted = iter(holm([one.p for one in tested if one.p is not None]))
    return tuple(
        one if one.p is None else dataclasses.replace(one, adjusted=next(adjusted), candidates=len(tested))
        for one in found
    )


def _check_floor(decoys: int, alpha: float, candidates: int) -> None:
    needed = fewest(alpha, candidates)
    if decoys < needed:
        raise UsageError(
            f"{decoys} decoys give p >= {floor_of(decoys):.4f}, which can never reach {alpha:g} over {candidates} "
            f"candidate(s). Make at least {needed}."
        )


def _likeness(mode: Mode, values: list[float], decoys: int) -> dict[str, float]:
    """The teacher's statistics by name; a residual is what sets columns apart, so one column alone has none."""
    soft = [f"{what}, {where}" for where in ("declared", "fresh") for what in ("residual", "agreement")]
    names = soft if mode == "soft" else ["agreement, declared"]
    named = dict(zip(names, values, strict=True))
    return {name: value for name, value in named.items() if decoys or name.startswith("agreement")}


def _interval(rows: Sequence[Rows], replicates: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the effect: inputs are drawn again, the columns and their spread are held fixed."""
    generator = np.random.default_rng(0)
    drawn: dict[int, np.ndarray] = {}
    values = []
    for number, statistic in enumerate(rows):
        n, place = statistic.over.shape[1], number // 2  # both statistics of a set of inputs see the same draw
        if place not in drawn:
            drawn[place] = generator.multinomial(n, np.full(n, 1 / n), size=replicates).astype(np.float64)
        values.append(statistic.value(drawn[place]))
    low, high = np.percentile(effect(combined(np.stack(values, axis=1))), [2.5, 97.5])
    return float(low), float(high)

"""A candidate teacher and its decoys: the same recipe under other seeds, and the misuses that are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from stillroom.errors import PairError, UsageError
from stillroom.provenance.audit.statistics import LOWEST

EXTREME = 0.05  # a rank of accuracy as unlikely as this is refused
FAR = 4.0  # standard deviations of the decoys


@dataclass(frozen=True, eq=False)
class Columns:
    """Answers of a candidate teacher (column 0) and its m decoys on the same inputs.

    ``answers``: name of a set of inputs -> [m + 1, n, C] log-probabilities in nats, or [m + 1, n] class numbers.
    ``recipes``: the digest of the recipe that made each column, seed left out; ``seeds``: the seed of each;
    ``right`` [m + 1]: how many of ``scored`` labelled inputs each answers correctly.
    """

    teacher: str
    answers: Mapping[str, np.ndarray]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    right: np.ndarray = field(default_factory=lambda: np.empty(0))
    scored: int = 0

    @property
    def decoys(self) -> int:
        """m, the number of decoys."""
        return len(self.recipes) - 1

    def led_by(self, column: int) -> Columns:
        """The same columns with another in front, as if it were the candidate: its own decoy takes its place."""
        order = [column, *(index for index in range(len(self.recipes)) if index != column)]
        return Columns(
            teacher=self.teacher if column == 0 else f"decoy of seed {self.seeds[column]}",
            answers={name: values[order] for name, values in self.answers.items()},
            recipes=tuple(self.recipes[index] for index in order),
            seeds=tuple(self.seeds[index] for index in order),
            right=self.right[order] if len(self.right) else self.right,
            scored=self.scored,
        )


def check_columns(columns: Columns) -> None:
    """Refuse columns that are not exchangeable, for then the rank of one is no p-value.

    Raises PairError for decoys of another recipe, a seed that stands twice, and a teacher that stands out among its
    decoys before any student is looked at: by accuracy (``accuracy_refusal``), or by how sure or how far from their
    mean its answers are (``answers_refusal``). UsageError where accuracies are missing or shapes differ.

    No check looks at the student, and a refusal can only prevent a rejection: P(reject) stays at most alpha.
    """
    wanted, *others = columns.recipes
    for digest, seed in zip(others, columns.seeds[1:], strict=True):
        if digest != wanted:
            raise PairError(
                f"the decoy of seed {seed} was made by another recipe ({digest[:12]}) than the teacher "
                f"({wanted[:12]}): they are not exchangeable, and p would mean nothing. Make decoys by the teacher's "
                "own recipe."
            )
    repeated = next((seed for place, seed in enumerate(columns.seeds) if seed in columns.seeds[:place]), None)
    if repeated is not None:
        raise PairError(f"seed {repeated} stands twice among teacher and decoys: one training counts once.")
    for name, values in columns.answers.items():
        if len(values) != len(columns.recipes):
            raise UsageError(f"{name}: {len(values)} columns of answers for {len(columns.recipes)} recipes.")
    if not columns.decoys:
        return
    if len(columns.right) != len(columns.recipes) or columns.scored < 1:
        raise UsageError(
            "give how many labelled inputs each column answers correctly (right, scored): a teacher that is better or "
            "worse than its decoys is found out by it."
        )
    refusal = accuracy_refusal(columns.right, columns.scored) or answers_refusal(columns.answers)
    if refusal is not None:
        raise PairError(
            f"{refusal}. It was not made as they were (chosen among several seeds, trained longer, larger, other "
            "data), so they are no decoys of it and p would mean nothing."
        )


def accuracy_refusal(right: np.ndarray, scored: int) -> str | None:
    """Why the teacher's accuracy does not belong among its decoys'; None when it does.

    Its rank is extreme when 2 min(#{columns >= it}, #{columns <= it}) / (m + 1) <= .05, itself counted: at most one of
    twenty honest teachers is refused by it. With fewer than 39 decoys no rank can be so extreme; there, and always,
    a teacher is refused that no decoy reaches and that lies more than 4 standard deviations from their mean.
    """
    right = np.asarray(right, dtype=np.float64)
    distance = _distance(right, least=1.0)  # one labelled input: accuracy knows no finer
    rank = 2 * min(int((right >= right[0]).sum()), int((right <= right[0]).sum())) / len(right)
    if rank > EXTREME and distance is None:
        return None
    shares = right / scored
    return (
        f"the teacher is right on {shares[0]:.4f} of {scored} labelled inputs, its {len(right) - 1} decoys on "
        f"{shares[1:].min():.4f} to {shares[1:].max():.4f}: {'better' if right[0] > right[1:].mean() else 'worse'} "
        f"than its decoys (two-sided rank p = {min(1.0, rank):.3f})"
    )


def answers_refusal(answers: Mapping[str, np.ndarray]) -> str | None:
    """Why the teacher's answers do not belong among its decoys'; None when they do.

    Two networks of equal accuracy may still be of different recipes: a larger one is surer. Compared are the mean
    entropy and the mean squared distance from the mean column, of log-probabilities; a teacher is refused that lies
    outside all decoys and more than 4 standard deviations from their mean (fewer than 1 in 1000 honest ones).
    """
    for name, values in answers.items():
        if values.ndim != 3:
            continue
        cut = np.maximum(np.asarray(values, dtype=np.float64), LOWEST)
        found = {
            "mean entropy": -(np.exp(cut) * cut).sum(-1).mean(-1),
            "mean squared distance from the mean answer": np.square(cut - cut.mean(0)).mean((1, 2)),
        }
        for what, each in found.items():
            distance = _distance(each, least=1e-9)
            if distance is not None:
                return (
                    f"the teacher's {what} on {name} inputs is {each[0]:.4f}, its decoys' {each[1:].min():.4f} to "
                    f"{each[1:].max():.4f}: {abs(distance):.1f} of their standard deviations from their mean"
                )
    return None


def _distance(values: np.ndarray, least: float) -> float | None:
    """How many standard deviations of its decoys column 0 lies outside all of them; None when it does not, or < 4."""
    decoys = values[1:]
    if decoys.min() <= values[0] <= decoys.max():
        return None
    spread = max(least, float(decoys.std(ddof=1)) if len(decoys) > 1 else least)
    distance = float(values[0] - decoys.mean()) / (spread * math.sqrt(1 + 1 / len(decoys)))
    return distance if abs(distance) > FAR else None

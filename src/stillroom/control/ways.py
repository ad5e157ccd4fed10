"""Four ways of choosing the states that a teacher is asked about, at equal numbers of questions.

cloning         the teacher drives
dart            the teacher drives, with noise on what it does; its answers stay clean (Laskey et al. 2017, DART)
dagger          student and teacher drive by turns, the teacher less in every round; all rounds are kept
                (Ross et al. 2011, DAgger)
student_drives  the student drives, and learns from its last round alone (rsl_rl's distillation)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from stillroom.errors import UsageError, nearest

Way = Literal["cloning", "dart", "dagger", "student_drives"]
WAYS: tuple[str, ...] = get_args(Way)


@dataclass(frozen=True)
class Round:
    """One round of gathering: how many questions, the teacher's share of the steps, and the noise."""

    questions: int
    teacher_share: float
    noise: float = 0.0
    keeps_earlier: bool = True  # whether the student learns from the rounds before it too


def rounds_of(
    way: str, questions: int, rounds: int = 5, noise: float = 0.2, first_share: float = 1.0, last_share: float = 0.0
) -> tuple[Round, ...]:
    """The rounds of a way; their questions add up to ``questions`` exactly.

    cloning and dart are one round, since nothing depends on a student. In dagger the teacher's share of the steps goes
    from ``first_share`` to ``last_share`` in a line; ``first_share=0`` is DAgger without mixing. ``noise``: of dart,
    standard deviation as a share of half the action's range.
    Raises UsageError for settings out of range, with the nearest name for a way that is not known.
    """
    if way not in WAYS:
        raise UsageError(f"there is no way of gathering {way!r}{nearest(way, WAYS)}")
    if rounds < 1 or questions < rounds:
        raise UsageError(f"{questions} questions in {rounds} rounds: give each round at least one.")
    if not 0 <= last_share <= first_share <= 1 or noise < 0:
        raise UsageError(
            f"the teacher's share goes from first_share={first_share} down to last_share={last_share}, both from 0 to "
            f"1; noise={noise} is not negative."
        )
    if way in ("cloning", "dart"):
        return (Round(questions, 1.0, noise if way == "dart" else 0.0),)
    sizes = [questions // rounds + (number < questions % rounds) for number in range(rounds)]
    if way == "student_drives":
        return tuple(Round(size, 0.0, keeps_earlier=False) for size in sizes)
    fall = (first_share - last_share) / max(1, rounds - 1)
    return tuple(Round(size, max(last_share, first_share - fall * number)) for number, size in enumerate(sizes))

"""Gather what a control student learns from: drive, ask the teacher, train a little, drive again. Resumes.

A folder of gathering: gathering.json (what it is), round-N.safetensors (Episodes), round-N/ (the student that was
trained on the rounds up to N, which drives in the next).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom import settings
from stillroom.control import Episodes, Round, Task, drive, joined, read_episodes, rounds_of, write_episodes
from stillroom.control.answered import Answered
from stillroom.digests import file_digest, state_digest
from stillroom.errors import SignalError, UsageError
from stillroom.files import claim_folder, read_json, write_json
from stillroom.fitting import fit
from stillroom.fitting.checkpoint import Step
from stillroom.plan import Plan
from stillroom.students.networks import Student
from stillroom.types import Model, identity_of

FILE = "gathering.json"
FORMAT = "stillroom-gathering/1"
GROWN = 100.0  # times its first value: a loss that large is no longer learning
FIRST_START = 0
FIRST_UNSEEN = 1_000_000  # starts from here on are for tests: gathering may never come so far


@dataclass(frozen=True)
class Gathering:
    """Settings. ``questions``: how often the teacher is asked in all, whatever the way (control.WAYS).

    ``rounds``: by default 5 of dagger and 20 of student_drives. ``steps``: of the training in each round; by default
    the plan's, divided by the rounds. ``noise``: of dart. ``first_share``, ``last_share``: of dagger, the teacher's
    share of the steps in the first round and in the last.
    """

    way: str = "dagger"
    questions: int = 4000
    rounds: int | None = None
    steps: int | None = None
    noise: float = 0.2
    first_share: float = 1.0
    last_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.planned  # refuses what cannot be
        if self.questions >= FIRST_UNSEEN:
            raise UsageError(f"questions={self.questions} is too many: starts from {FIRST_UNSEEN} on are for tests.")

    @property
    def planned(self) -> tuple[Round, ...]:
        """The rounds."""
        rounds = self.rounds or (20 if self.way == "student_drives" else 5)
        return rounds_of(self.way, self.questions, rounds, self.noise, self.first_share, self.last_share)


@dataclass(frozen=True, eq=False)
class Gathered:
    """What the last training starts from: its examples, their answers, and the student and plan to train with.

    Where earlier rounds are kept, the student is the untrained one and the plan the whole plan; in student_drives the
    student is the one of the round before, and the plan that of one round.
    """

    episodes: Episodes
    student: Student
    plan: Plan
    asked: int  # how often the teacher was


def gather(
    student: Student,
    teacher: Model,
    tasks: Sequence[Task],
    objective: Any,
    gathering: Gathering,
    *,
    plan: Plan,
    folder: str | Path,
    progress: bool = True,
) -> Gathered:
    """Ask the teacher ``gathering.questions`` times at states of its way's choosing; every round is kept in ``folder``.

    Raises FolderError for the folder of another gathering, and what ``drive`` and ``fit`` raise: SignalError for a
    student whose actions or loss run away (its state stays in the round's folder).
    """
    folder = Path(folder)
    about = _about(student, teacher, tasks, objective, gathering, plan)
    claim_folder(folder, FILE, about, "gathering")
    if not (folder / FILE).exists():
        write_json(folder / FILE, {**about, "complete": False})
    rounds = gathering.planned
    part = dataclasses.replace(plan, steps=_steps(gathering, plan, len(rounds)))
    kept: list[Episodes] = []
    driver, start, used = student, student, FIRST_START
    for number, this in enumerate(rounds):
        found = _round(folder, number, this, driver, teacher, tasks, used, gathering, progress)
        used += len(found)
        kept = [*kept, found] if this.keeps_earlier else [found]
        start = driver
        if number + 1 < len(rounds):
            driver = _trained(driver, teacher, joined(kept), objective, part, folder / f"round-{number}", progress)
    episodes = joined(kept)
    asked = sum(this.questions for this in rounds)
    files = {f"round-{n}.safetensors": file_digest(folder / f"round-{n}.safetensors") for n in range(len(rounds))}
    write_json(folder / FILE, {**about, "complete": True, "asked": asked, "rows": episodes.steps, "rounds": files})
    keeps = rounds[-1].keeps_earlier
    return Gathered(episodes, student if keeps else start, plan if keeps else part, asked)


def opened(folder: str | Path) -> Episodes:
    """The episodes that the student learns from, of a finished gathering. Raises MissingFileError, FolderError."""
    folder = Path(folder)
    about = read_json(folder / FILE)
    if not about["complete"]:
        raise UsageError(f"{folder} is unfinished: gather again, it goes on where it stopped.")
    kept = Gathering(**about["gathering"]).planned[-1].keeps_earlier
    numbers = range(len(about["rounds"])) if kept else [len(about["rounds"]) - 1]
    return joined([read_episodes(folder / f"round-{number}.safetensors") for number in numbers])


def not_growing(step_of: str) -> Callable[[Step], None]:
    """A watcher of ``fit`` that stops a training whose loss has grown a hundredfold."""
    first: list[float] = []

    def watch(row: Step) -> None:
        first.append(row.loss)
        if row.loss > GROWN * max(first[0], 1e-3):
            raise SignalError(
                f"{step_of}: the loss is {row.loss:.3g} at step {row.step}, and was {first[0]:.3g} at first: the "
                f"student diverges. Its state is kept. Lower fit.learning_rate (here {row.learning_rate:.2g})."
            )

    return watch


def _about(
    student: Student, teacher: Model, tasks: Sequence[Task], objective: Any, gathering: Gathering, plan: Plan
) -> dict[str, Any]:
    """What decides the bytes of a gathering."""
    return {
        "format": FORMAT,
        "gathering": {f.name: getattr(gathering, f.name) for f in dataclasses.fields(gathering)},
        "tasks": [settings.describe(task) for task in tasks],
        "teacher": settings.describe(identity_of(teacher)),
        "student": state_digest(student.net.state_dict()),
        "objective": settings.describe(objective),
        "plan": settings.describe(plan),
    }


def _steps(gathering: Gathering, plan: Plan, rounds: int) -> int:
    return gathering.steps or max(1, plan.total_steps(gathering.questions) // rounds)


def _round(
    folder: Path,
    number: int,
    this: Round,
    driver: Student,
    teacher: Model,
    tasks: Sequence[Task],
    used: int,
    gathering: Gathering,
    progress: bool,
) -> Episodes:
    """The episodes of a round, driven or read."""
    path = folder / f"round-{number}.safetensors"
    if path.is_file():
        return read_episodes(path)
    found = drive(
        teacher if this.teacher_share == 1 else driver,
        tasks,
        range(used, used + this.questions),
        teacher=teacher,
        teacher_share=0.0 if this.teacher_share == 1 else this.teacher_share,
        noise=this.noise,
        seed=gathering.seed,
        limit=this.questions,
        title=f"{gathering.way}, round {number + 1}",
        progress=progress,
    )
    write_episodes(found, path)
    return found


def _trained(
    student: Student, teacher: Model, kept: Episodes, objective: Any, plan: Plan, folder: Path, progress: bool
) -> Student:
    answers = Answered(kept, identity_of(teacher))
    watchers = (not_growing(folder.name),)
    return fit(
        student, answers, kept.table(), objective, plan=plan, folder=folder, watchers=watchers, progress=progress
    )

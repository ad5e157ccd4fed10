"""A run of a control task: the same stages, on data that are met while driving, scored in closed loop."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch

from stillroom.checking import Check, Estimate, preflight
from stillroom.control import Outcomes, Task, drive, outcomes_of, read_episodes, write_episodes
from stillroom.control.answered import Answered
from stillroom.control.episodes import Episodes
from stillroom.control.outcomes import metrics_for, starts_table
from stillroom.control.pictures import told
from stillroom.data.table import Table
from stillroom.errors import StillroomError, UsageError
from stillroom.evaluation import FILE, Report, costs_of, evaluate
from stillroom.files import write_json
from stillroom.fitting import fit
from stillroom.gathering import FIRST_UNSEEN, Gathered, Gathering, gather, not_growing
from stillroom.measures.wording import columns_about
from stillroom.recipes.gating import check_requests
from stillroom.recipes.named import TASKS, call
from stillroom.recipes.parts import keep_of, plan_of
from stillroom.recipes.starts import network_start
from stillroom.recipes.uses import Driving
from stillroom.recording import Recording, open_recording, record
from stillroom.run import Run
from stillroom.students.networks import Student, load_student
from stillroom.types import Batch, Signal, identity_of

CLONING = "cloning"  # the control's row, and its folder


@dataclasses.dataclass(frozen=True)
class DrivenRun(Run):
    """A Run whose recipe has ``data.driving``."""

    @property
    def driving(self) -> Driving:
        """The recipe's part."""
        assert self.recipe.data.driving is not None
        return self.recipe.data.driving

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the recipe names."""
        found = call(self.driving.task, TASKS, self.base, "task", {"folder": self.base})
        tasks = (found,) if isinstance(found, Task) else tuple(found)
        if not tasks or not all(isinstance(task, Task) for task in tasks):
            raise UsageError(f"task {self.driving.task.use!r} returned {found!r}; it returns a stillroom.control.Task.")
        return tasks

    @cached_property
    def sources(self) -> dict[str, Table]:
        """The first state of each task: what the columns are, before anybody drives."""
        task = self.tasks[0]

        def still(batch: Batch) -> Signal:
            return Signal(values=torch.zeros(len(batch), task.actions))

        first = drive(still, self.tasks, range(len(self.tasks)), limit=len(self.tasks))
        return {"train": first.table(", ".join(t.name for t in self.tasks), licence=task.licence, source=task.source)}

    @cached_property
    def unseen(self) -> range:
        """The starts that the students are tested from; each task has its share of them."""
        return range(FIRST_UNSEEN, FIRST_UNSEEN + self.driving.unseen * len(self.tasks))

    @cached_property
    def shown(self) -> Episodes:
        """The teacher's own episodes from the unseen starts; kept, so that it drives them once."""
        path = self.folder / "gathering" / "teacher.safetensors"
        if self.claimed and path.is_file():
            return read_episodes(path)
        found = drive(
            self.teacher, self.tasks, self.unseen, teacher=self.teacher, title="teacher drives", progress=self.progress
        )
        if self.claimed:
            write_episodes(found, path)
        return found

    @property
    def shared(self) -> dict[str, Any]:
        """None: nobody drives from a training start in the test."""
        return {}

    @cached_property
    def data(self) -> dict[str, Any]:
        """Before gathering there is only the first state of each task to learn from."""
        train = self.sources["train"]
        return {"train": train, "labelled": train, "pool": train, "test": self.test}

    @property
    def _offered(self) -> dict[str, Any]:
        offered: dict[str, Any] = {"tasks": self.tasks, "folder": self.base, "progress": self.progress}
        return offered | ({"workspace": self.folder / "teacher"} if self.claimed else {})

    @cached_property
    def test(self) -> Table:
        """The states where the teacher's own driving leads, labelled with its answers: for exports."""
        return self._table(self.shown, "teacher's states", labelled=True)

    @cached_property
    def pool(self) -> Table:
        """What the student learns from: the states that were gathered."""
        return self._table(self.gathered.episodes, f"states met by {self.driving.way}")

    def _table(self, episodes: Episodes, name: str, labelled: bool = False) -> Table:
        return episodes.table(name, labelled, licence=self.tasks[0].licence, source=self.tasks[0].source)

    def student(self, seed: int) -> Student:
        """The untrained student; a factory with ``inputs`` and ``outputs`` gets them from the task."""
        train = self.sources["train"]
        inputs = int(train.column("x").shape[1])  # type: ignore[union-attr]
        return network_start(self.recipe, seed, train, self.base, inputs=inputs, outputs=self.tasks[0].actions)

    def check(self) -> tuple[tuple[Check, ...], Estimate | None]:
        """First the teacher's own success, since a teacher that fails teaches to fail; then that all parts fit."""
        _ = self.allowed
        student, plan = self.student(self.recipe.seeds[0]), plan_of(self.recipe, self.recipe.seeds[0], 1)
        checks = [_looked("teacher does its task", self._teachers_success)]
        if checks[0].passed:
            checks.append(_looked("environment and student fit", lambda: self._fits(student)))
        if all(check.passed for check in checks):
            shown = self._table(self.shown, "teacher's states")
            checks += preflight(self.teacher, student, shown, self.objective, plan=plan)
        return tuple(checks), None

    def _teachers_success(self) -> tuple[bool, str]:
        shown, starts = self.shown, f"of {len(self.shown)} unseen starts"
        mean = float(shown.returns.mean())
        if any(task.succeeded is None for task in self.tasks):
            least = self.driving.least_return
            return least is None or mean >= least, f"mean return {mean:.4g} {starts} (asked: {least})"
        share = float(shown.success.mean())
        worst = min(self.tasks, key=lambda task: _success_of(shown, task.name)).name
        found = f"success from {share:.0%} {starts}; least in {worst} ({_success_of(shown, worst):.0%})"
        asked = self.driving.least_success
        return _success_of(shown, worst) >= asked, f"{found}; least_success asks {asked:.0%} of every task"

    def _fits(self, student: Student) -> tuple[bool, str]:
        parameters = sum(p.numel() for p in student.net.parameters())
        drive(student.predict, self.tasks, list(self.unseen)[: len(self.tasks)], limit=len(self.tasks))
        inputs, outputs = int(self.sources["train"].column("x").shape[1]), self.tasks[0].actions  # type: ignore[union-attr]
        return True, f"{inputs} numbers seen, {outputs} of an action, {parameters:,} parameters"

    @cached_property
    def gathered(self) -> Gathered:
        """What the student learns from; asked for once, in gathering/."""
        _ = self.allowed
        check_requests(self.recipe.terms, self.driving.questions + len(self.shown.states))
        return self._gathered(self.driving.way, "gathering")

    def _gathered(self, way: str, folder: str) -> Gathered:
        names = ("questions", "rounds", "steps", "noise", "first_share", "last_share")
        how = Gathering(way=way, **{name: getattr(self.driving, name) for name in names})
        seed = self.recipe.seeds[0]
        return gather(
            self.student(seed),
            self.teacher,
            self.tasks,
            self.objective,
            how,
            plan=plan_of(self.recipe, seed, self.driving.questions),
            folder=self.folder / folder,
            progress=self.progress,
        )

    def record(self) -> Recording:
        """The answers that were given while driving, as a recording: nobody is asked again."""
        answers = Answered(self.gathered.episodes, identity_of(self.teacher))
        batch_size = self.recipe.record.batch_size
        keep = keep_of(self.recipe, self.base)
        folder = self.folder / "recording"
        return record(answers, self.pool, folder, keep, batch_size=batch_size, progress=self.progress)

    def fit(self) -> dict[str, list[Student]]:
        """Train the student on what was gathered, once per seed, and the control on as many cloned answers."""
        recording = open_recording(self.folder / "recording", self.base)
        students = [self._fit(seed, self.gathered, recording, self.pool, "student") for seed in self.recipe.seeds]
        trained = {"student": students}
        if self._has_control:
            cloned = self._gathered(CLONING, CLONING)
            answers = Answered(cloned.episodes, identity_of(self.teacher))
            rows = self._table(cloned.episodes, "states met by cloning")
            trained[CLONING] = [self._fit(seed, cloned, answers, rows, CLONING) for seed in self.recipe.seeds]
        return trained

    @property
    def _has_control(self) -> bool:
        return self.driving.cloning and self.driving.way != CLONING

    def _fit(self, seed: int, gathered: Gathered, answers: Any, rows: Table, role: str) -> Student:
        same = gathered.plan.steps != plan_of(self.recipe, seed, self.driving.questions).steps
        start = gathered.student if seed == self.recipe.seeds[0] or same else self.student(seed)
        return fit(
            start,
            answers,
            rows,
            self.objective,
            plan=dataclasses.replace(gathered.plan, seed=seed),
            folder=self._folder(role, seed),
            trackers=self.recipe.trackers,
            watchers=(not_growing(role),),
            progress=self.progress,
        )

    def _folder(self, role: str, seed: int) -> Any:
        return self.folder / CLONING / f"student-{seed}" if role == CLONING else self.place(role, seed)

    def trained(self) -> dict[str, list[Student]]:
        """The students as they lie on disk."""
        roles = ["student", CLONING] if self._has_control else ["student"]
        return {role: [load_student(self._folder(role, s), self.base) for s in self.recipe.seeds] for role in roles}

    def evaluate(self) -> Report:
        """Score every row by driving from the unseen starts, undisturbed and disturbed."""
        models: dict[str, Any] = {"teacher": [self.teacher], **self.trained()}
        models["untrained"] = [self.student(self.recipe.seeds[0])]
        outcomes: dict[str, list[Outcomes]] = {}
        driven: dict[str, Episodes] = {"teacher": self.shown}
        for name, seeds in models.items():
            found = [self._outcomes(name, model) for model in seeds]
            outcomes[name], driven[name] = [outcome for outcome, _ in found], found[0][1]
        chosen, folder = metrics_for(self.tasks), self.folder / "report"
        first = outcomes["teacher"][0]
        replicates = self.recipe.evaluate.replicates
        report = evaluate(
            outcomes, first, starts_table(first), chosen, folder, replicates=replicates, costs=False, progress=False
        )
        rows = {name: {**report.rows[name], **costs_of(seeds[0], self.test)} for name, seeds in models.items()}
        for name, (only, *others) in outcomes.items():
            shares = [] if others else [m.name for m in chosen if m.name.startswith("success")]
            rows[name] |= {share: only.share(share).as_json() for share in shares}
        teacher = {"name": identity_of(self.teacher).name}
        report = dataclasses.replace(
            report, rows=rows, metrics=columns_about(chosen, rows), disagreements=(), teacher=teacher
        )
        write_json(folder / FILE, report.as_json())
        write_json(folder / "driving.json", told(self.tasks, outcomes, driven, self.gathered.asked, folder))
        return report

    def _outcomes(self, name: str, model: Any) -> tuple[Outcomes, Episodes]:
        policy = model.predict if isinstance(model, Student) else model
        return outcomes_of(
            policy, self.tasks, self.unseen, self.teacher, self.shown, title=name, progress=self.progress
        )


def _looked(name: str, look: Any) -> Check:
    """One check; an error that a user can act on is its failure."""
    remedy = "A teacher that fails teaches to fail: mend it, or lower data.driving.least_success knowingly."
    try:
        passed, detail = look()
    except StillroomError as error:
        return Check(name, False, str(error), "Mend this first: the run would stop here too.")
    return Check(name, passed, detail, "" if passed else remedy)


def _success_of(shown: Episodes, task: str) -> float:
    found = [done for name, done in zip(shown.tasks, shown.success, strict=True) if name == task]
    return sum(map(bool, found)) / max(1, len(found))

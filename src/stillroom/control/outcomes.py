"""How well a policy does in its closed loop: one row of numbers for each unseen start, and the metrics over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.control.driving import drive
from stillroom.control.episodes import Episodes
from stillroom.control.task import Task
from stillroom.data.table import Table
from stillroom.measures.bootstrap import Interval
from stillroom.measures.scored import Scored
from stillroom.measures.sums import RatioOfSums
from stillroom.types import Batch, Metric, Model, Signal

# The numbers of a start. Sums and counts are of squared action errors, over the steps of that start's episode.
COLUMNS = (
    "success", "return", "steps", "own_error", "own_count", "teacher_error", "teacher_count",
    "success_disturbed", "return_disturbed",
)  # fmt: skip
SURE = 1.959964  # standard deviations of 95 %
DISTURBED = 1  # the seed of the disturbance: the same noise for every policy


@dataclass(frozen=True, eq=False)
class Outcomes(Scored):
    """What a policy did, as a Model: a batch of starts ('task/start') -> values [B, COLUMNS]."""

    def share(self, column: str) -> Interval:
        """The mean of a column of 0 and 1 over all starts, with its interval."""
        return share_interval(self.mean(column) * len(self.rows), len(self.rows))

    def mean(self, column: str, task: str | None = None) -> float:
        """The mean of a column over all starts, or over one task's."""
        at = COLUMNS.index(column)
        found = [row[at] for name, row in self.rows.items() if task is None or name.partition("/")[0] == task]
        return float(np.mean(found))


def starts_table(outcomes: Outcomes) -> Table:
    """The starts as examples; their label is what is wanted of each: 1."""
    names = tuple(outcomes.rows)
    return Table({"start": names}, names, labels=torch.ones(len(names), 1), name="unseen starts", licence="unknown")


def outcomes_of(
    policy: Model,
    tasks: Sequence[Task],
    starts: Sequence[int],
    teacher: Model,
    shown: Episodes,
    *,
    title: str = "policy",
    progress: bool = False,
) -> tuple[Outcomes, Episodes]:
    """Drive ``policy`` from every start, and again with the tasks' disturbance; the teacher is asked along the way.

    ``shown``: the teacher's own episodes from the same starts, on which the policy's actions are compared. Returns the
    outcomes and the undisturbed episodes. Raises what ``drive`` raises.
    """
    own = shown if policy is teacher else _driven(policy, tasks, starts, teacher, f"{title} drives", progress)
    disturbed = _disturbed(policy, tasks, starts, f"{title}, disturbed", progress)
    errors, theirs = own.per_episode(own.errors()), shown.per_episode(shown.errors(_answers(policy, teacher, shown)))
    rows: dict[str, tuple[float, ...]] = {}
    for number, (task, start) in enumerate(zip(own.tasks, own.starts, strict=True)):
        rough = own if disturbed is None else disturbed
        rows[f"{task}/{start}"] = (
            float(own.success[number]),
            float(own.returns[number]),
            float(own.lengths[number]),
            float(errors[number].sum()),
            float(len(errors[number])),
            float(theirs[number].sum()),
            float(len(theirs[number])),
            float(rough.success[number]),
            float(rough.returns[number]),
        )
    return Outcomes(rows), own


def _driven(policy: Model, tasks: Any, starts: Any, teacher: Model, title: str, progress: bool) -> Episodes:
    return drive(policy, tasks, starts, teacher=teacher, title=title, progress=progress)


def _disturbed(policy: Model, tasks: Sequence[Task], starts: Any, title: str, progress: bool) -> Episodes | None:
    """With each task's own disturbance; None where no task has one."""
    strengths = {task.disturbance for task in tasks}
    if strengths == {0.0}:
        return None
    noise = max(strengths)
    return drive(policy, tasks, starts, noise=noise, seed=DISTURBED, title=title, progress=progress)


@torch.no_grad()
def _answers(policy: Model, teacher: Model, shown: Episodes) -> np.ndarray | None:
    """The policy's actions [N, A] at the teacher's states."""
    if policy is teacher:
        return None
    table = shown.table()
    pieces = [
        policy(table.batch(range(first, min(first + 1024, len(table))))).need_values("the policy").cpu().numpy()
        for first in range(0, len(table), 1024)
    ]
    return np.concatenate(pieces)


def _column(signal: Signal, name: str) -> Tensor:
    values = signal.need_values("closed loop")[:, COLUMNS.index(name)].double()
    return torch.stack([values, torch.ones_like(values)], -1)


def _pair(signal: Signal, first: str, second: str) -> Tensor:
    values = signal.need_values("closed loop").double()
    return values[:, [COLUMNS.index(first), COLUMNS.index(second)]]


def success(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The share of unseen starts from which the task was done."""
    return _column(student, "success")


def success_disturbed(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The same with noise on every action (the task's disturbance)."""
    return _column(student, "success_disturbed")


def steps(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """Steps of an episode, mean."""
    return _column(student, "steps")


def total_return(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The sum of an episode's rewards, mean over unseen starts."""
    return _column(student, "return")


def return_disturbed(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The same with noise on every action (the task's disturbance)."""
    return _column(student, "return_disturbed")


def worst_return(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The return of the worst episode. Its interval comes of resampled episodes, and says little beyond them."""
    return _column(student, "return")


def error_teacher_states(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """Mean squared difference from the teacher's action at the states where the teacher's driving leads."""
    return _pair(student, "teacher_error", "teacher_count")


def error_own_states(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """The same at the states where the policy's own driving leads."""
    return _pair(student, "own_error", "own_count")


def error_ratio(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """Error on its own states over error on the teacher's: how far it has left what it knows (1: not at all)."""
    return torch.cat([_pair(student, "own_error", "own_count"), _pair(student, "teacher_error", "teacher_count")], -1)


def share_interval(done: float, starts: int) -> Interval:
    """A share of successes and its 95 % interval by Wilson 1927: a bootstrap would be sure of 0 and of 1."""
    share, squared = done / starts, SURE**2
    middle = (share + squared / (2 * starts)) / (1 + squared / starts)
    reach = SURE * math.sqrt(share * (1 - share) / starts + squared / (4 * starts**2)) / (1 + squared / starts)
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return Interval(share, low if done else 0.0, high if done < starts else 1.0)  # to the last bit


def least(statistics: Tensor) -> float:
    """The smallest of the first column."""
    return float(statistics[:, 0].min())


@dataclass(frozen=True)
class RatioOfMeans:
    """(sum of column 0 / sum of 1) / (sum of 2 / sum of 3)."""

    def __call__(self, statistics: Tensor) -> float:
        return float(self.of_sums(statistics.double().sum(0).numpy()))

    def of_sums(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])


_MEAN = RatioOfSums()
METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("success", success, _MEAN),
        Metric("success_disturbed", success_disturbed, _MEAN),
        Metric("mean_return", total_return, _MEAN),
        Metric("worst_return", worst_return, least),
        Metric("return_disturbed", return_disturbed, _MEAN),
        Metric("episode_steps", steps, _MEAN, higher_is_better=None),
        Metric("error_teacher_states", error_teacher_states, _MEAN, higher_is_better=False, against_teacher=True),
        Metric("error_own_states", error_own_states, _MEAN, higher_is_better=False, against_teacher=True),
        Metric("error_ratio", error_ratio, RatioOfMeans(), higher_is_better=False, against_teacher=True),
    )
}


def metrics_for(tasks: Sequence[Task]) -> tuple[Metric, ...]:
    """Success where tasks say what it is, returns where they do not (or where success does not end an episode)."""
    names = []
    if all(task.succeeded is not None for task in tasks):
        names += ["success", "success_disturbed", "episode_steps"]
    if not any(task.succeeded is not None and task.ends_at_success for task in tasks):
        names += ["mean_return", "worst_return", "return_disturbed"]
    if not any(task.disturbance for task in tasks):
        names = [name for name in names if not name.endswith("_disturbed")]
    return tuple(METRICS[name] for name in (*names, "error_teacher_states", "error_own_states", "error_ratio"))

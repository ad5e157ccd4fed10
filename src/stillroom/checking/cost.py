"""What a run will take, measured on a few batches, and how checks and cost are shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor

from stillroom.checking.pair import ASKED, Check, featured, some, tensors_of
from stillroom.objectives import built
from stillroom.plan import Plan
from stillroom.students import Student
from stillroom.types import Batch, Examples, Model, Signal

STEPS, ENOUGH = 20, 3.0  # training steps that are timed, and the seconds after which fewer are


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from a few batches: seconds, bytes on disk, bytes of memory (weights, optimiser, batch)."""

    record_seconds: float
    fit_seconds: float
    disk_bytes: int
    memory_bytes: int


def estimate(
    teacher: Model,
    student: Student,
    examples: Examples,
    objective: Any,
    plan: Plan,
    kept: Callable[[Signal, Batch], tuple[int, int]] | None = None,
) -> Estimate:
    """Time, disk and memory of one recording and one training, measured on a few batches of each.

    ``kept``: bytes of these examples' answers and bytes kept once, as the recording's codecs write them; default: the
    answers as they come.
    """
    batch = some(examples, ASKED, plan)
    with torch.no_grad():
        teacher(batch)
        began = time.perf_counter()
        said = featured(teacher, objective)(batch)
        asking = (time.perf_counter() - began) / len(batch)
    views = max(1, plan.views or 1)
    answers, once = (kept or _as_they_come)(said, batch)
    return Estimate(
        record_seconds=asking * len(examples) * views,
        fit_seconds=_step_seconds(said, student, batch, objective) / len(batch) * plan.batch_size
        * plan.total_steps(len(examples)),
        disk_bytes=once + int((answers / len(batch) + 32) * len(examples) * views),
        memory_bytes=_memory(student, batch, plan),
    )  # fmt: skip


def _as_they_come(said: Signal, _batch: Batch) -> tuple[int, int]:
    return sum(t.numel() * t.element_size() for t in tensors_of(said).values()), 0


def _step_seconds(said: Signal, student: Student, batch: Batch, objective: Any) -> float:
    mine = student.copy().with_features(tuple(getattr(objective, "student_features", ())))
    ready, _ = built(objective, mine.predict(batch), said)
    mine.net.train()
    spent: list[float] = []
    # threads take some steps to settle, and a shared machine has bad moments: the fastest of up to 20 steps
    while len(spent) < 3 or (len(spent) < STEPS and sum(spent) < ENOUGH):
        began = time.perf_counter()
        terms = ready(mine(batch), said, batch)
        torch.stack([values.sum() for values in terms.values()]).sum().backward()
        spent.append(time.perf_counter() - began)
    return min(spent)


def _memory(student: Student, batch: Batch, plan: Plan) -> int:
    weights = sum(p.numel() * p.element_size() for p in student.net.parameters())
    row = sum(c.numel() * c.element_size() for c in batch.inputs.values() if isinstance(c, Tensor)) / len(batch)
    states = 3 if plan.optimiser == "adamw" else 2  # gradient and moments beside the weights
    return int(weights * (1 + states) + row * plan.batch_size)


def show(checks: Sequence[Check], cost: Estimate | None = None) -> Group:
    """The checks as lines for a terminal, with what to do about those that failed."""
    table = RichTable(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mark = Text("ok  ", style="green") if check.passed else Text("FAIL", style="bold red")
        table.add_row(mark, check.name, Text(check.detail + ("" if check.passed else f"\n{check.remedy}")))
    if cost is None:
        return Group(table)
    line = (
        f"estimate: record {_seconds(cost.record_seconds)}, fit {_seconds(cost.fit_seconds)} a training, "
        f"{cost.disk_bytes / 1e6:,.1f} MB on disk, {cost.memory_bytes / 1e6:,.1f} MB to train the student"
    )
    return Group(table, Text(line))


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

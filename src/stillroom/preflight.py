"""What would go wrong later, found before anything long starts; and what it will cost, measured on a few batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor

from stillroom.errors import StillroomError
from stillroom.labels import labelled_batch
from stillroom.objectives import built, counted_positions
from stillroom.plan import Plan, views_of_epoch
from stillroom.students import Student
from stillroom.types import Batch, Dense, Examples, Model, Signal, identity_of

ASKED = 16  # examples that are asked about
LABELLED = 200  # labelled rows that the teacher is scored on, at most
Finding = tuple[bool, str, str]  # passed, detail, remedy


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``remedy`` says what to do when it failed."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from a few batches: seconds, bytes on disk, bytes of memory (weights, optimiser, batch)."""

    record_seconds: float
    fit_seconds: float
    disk_bytes: int
    memory_bytes: int


def preflight(
    teacher: Model | None,
    student: Student,
    examples: Examples,
    objective: Any,
    *,
    labelled: Examples | None = None,
    plan: Plan | None = None,
) -> tuple[Check, ...]:
    """All checks, passed and failed. ``labelled``: a few labelled rows that the teacher is scored on.

    The student is not changed. A check that cannot be made because of an error fails, with the error as its detail.
    """
    batch = _first(examples, plan or Plan())
    checks: list[Check] = [_checked("data", lambda: _data(batch))]
    if teacher is not None:
        with torch.no_grad():
            checks += [
                _checked("teacher answers in evaluation mode", lambda: _mode(teacher, batch)),
                _checked("class order", lambda: _classes(teacher, student, examples, batch)),
            ]
            if labelled is not None and len(labelled):
                checks.append(_checked("teacher is better than guessing", lambda: _above_chance(teacher, labelled)))
    checks += [
        _checked("gradient reaches the student only", lambda: _gradient(teacher, student, batch, objective)),
        _checked("teacher against itself is 0", lambda: _zero(teacher, batch, objective)),
    ]
    return tuple(checks)


def _checked(name: str, look: Callable[[], Finding]) -> Check:
    try:
        passed, detail, remedy = look()
    except (StillroomError, RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        return Check(
            name, False, " ".join(str(error).split()), "See the message; stillroom stops before it costs time."
        )
    return Check(name, passed, detail, "" if passed else remedy)


def _first(examples: Examples, plan: Plan) -> Batch:
    rows = range(min(ASKED, len(examples)))
    view = views_of_epoch(plan, examples, 0, None)
    return examples.batch(rows, None if view is None else [view] * len(rows))


def _data(batch: Batch) -> Finding:
    remedy = "Look at how the column is read and scaled."
    for name, column in batch.inputs.items():
        if isinstance(column, Tensor):
            if column.is_floating_point() and not bool(column.isfinite().all()):
                row = int((~column.flatten(1).isfinite().all(1)).nonzero()[0])
                return False, f"column {name!r} of example {batch.ids[row]!r} holds NaN or infinity", remedy
            if len(column) > 1 and bool((column == column[:1]).all()):
                return False, f"column {name!r} is the same in {len(column)} examples", remedy
        elif not any(text.strip() for text in column):
            return False, f"column {name!r} holds no text in {len(column)} examples", remedy
    counted = counted_positions(batch)
    if not bool(counted.any()):
        return (
            False,
            "the mask is False everywhere: no position counts",
            "Check the mask (True where a position counts).",
        )
    return True, "; ".join(f"{name}: {_range(column)}" for name, column in batch.inputs.items()), ""


def _range(column: Any) -> str:
    if not isinstance(column, Tensor):
        return f"text of {min(map(len, column))} to {max(map(len, column))} characters"
    return f"{list(column.shape[1:])} from {float(column.min()):.3g} to {float(column.max()):.3g}"


def _mode(teacher: Model, batch: Batch) -> Finding:
    net = getattr(teacher, "net", None)
    if isinstance(net, torch.nn.Module) and any(module.training for module in net.modules()):
        return False, "the network, or a part of it, is in training mode", "Call .eval() on the teacher's network."
    first, again = teacher(batch), teacher(batch)
    for name, tensor in _tensors(first).items():
        if bool(tensor.isnan().any()):
            row = int(tensor.flatten(1).isnan().any(1).nonzero()[0])
            return False, f"{name} for example {batch.ids[row]!r} holds NaN", "Look at that input; try float32."
        if not torch.equal(tensor, _tensors(again)[name]):
            return False, f"{name} differs when the same batch is asked twice", "Find what is random in the teacher."
    return True, f"gives {', '.join(first.given)}", ""


def _classes(teacher: Model, student: Student, examples: Examples, batch: Batch) -> Finding:
    orders = {
        "teacher": identity_of(teacher).classes,
        "student": student.classes,
        "data": getattr(examples, "classes", None),
    }
    known = {whose: tuple(order) for whose, order in orders.items() if order is not None}
    if len(set(known.values())) > 1:
        shown = "; ".join(f"{whose}: {', '.join(order[:6])}" for whose, order in known.items())
        return (
            False,
            f"they differ: {shown}",
            "Give all the same order; reorder the teacher's logits where it has another.",
        )
    said, ours = teacher(batch), student.predict(batch)
    widths = {w: s.logits.vocabulary for w, s in (("teacher", said), ("student", ours)) if s.logits is not None}
    expected = len(next(iter(known.values()))) if known else None
    for whose, width in widths.items():
        if expected is not None and width < expected:
            return False, f"the {whose} gives {width} logits for {expected} classes", "Check the size of its output."
    if len(widths) == 2 and widths["student"] < widths["teacher"]:
        return (
            False,
            f"the student gives {widths['student']} logits, the teacher {widths['teacher']}",
            "Enlarge its output.",
        )
    if batch.labels is not None and not batch.labels.is_floating_point() and expected is not None:
        worst = int(batch.labels.max())
        if worst >= expected:
            return False, f"label {worst} among {expected} classes", "Check the labels."
    return True, ", ".join(next(iter(known.values()))[:8]) if known else "no class names are known", ""


def _above_chance(teacher: Model, labelled: Examples) -> Finding:
    batch = labelled_batch(labelled)
    rows = range(min(LABELLED, len(batch)))
    labels = batch.labels[: len(rows)] if batch.labels is not None else torch.empty(0)
    asked = Batch(batch.ids[: len(rows)], {n: c[: len(rows)] for n, c in batch.inputs.items()}, labels)
    said = teacher(asked)
    if said.logits is None or labels.is_floating_point() or labels.dim() != 1:
        return True, "not a classifier of one label per example: not looked at", ""
    if not isinstance(said.logits, Dense):
        return True, f"{type(said.logits).__name__} logits: not looked at", ""
    right = int((said.logits.values.argmax(-1).cpu() == labels).sum())
    majority = float(torch.bincount(labels).max()) / len(labels)
    detail = f"{right} of {len(labels)} labelled right ({right / len(labels):.1%}; the largest class {majority:.1%})"
    # a right answer by chance in as many or more cases: binomial tail at the largest class's share
    tail = math.fsum(_binomial(k, len(labels), majority) for k in range(right, len(labels) + 1))
    return tail < 0.05, detail, "Check that its weights are loaded, its class order, and how its inputs are scaled."


def _binomial(k: int, n: int, p: float) -> float:
    if p >= 1:
        return float(k == n)
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    return math.exp(log)


def _gradient(teacher: Model | None, student: Student, batch: Batch, objective: Any) -> Finding:
    mine = student.copy().with_features(tuple(getattr(objective, "student_features", ())))
    mine.net.train()
    with torch.no_grad():
        target = _featured(teacher, objective)(batch) if teacher is not None else Signal()
        ready, _ = built(objective, mine.predict(batch), target)
    watched = target.map(lambda t: t.clone().requires_grad_(t.is_floating_point()))
    terms = ready(mine(batch), watched, batch)
    total = torch.stack([values.sum() for values in terms.values()]).sum()
    if not total.requires_grad:
        return False, "no gradient reaches the student", "Does its forward detach, or run under no_grad?"
    if not bool(total.isfinite()):
        return False, f"the objective is {float(total)}", "Look for extreme inputs or answers."
    total.backward()
    blind = [n for n, p in mine.net.named_parameters() if p.requires_grad and p.grad is None]
    if blind:
        return False, f"no gradient reaches {len(blind)} parameters, such as {blind[0]}", "Are they used in forward()?"
    if any(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in _tensors(watched).values()):
        return False, "a gradient reaches the teacher's answer", "Detach the teacher in the objective."
    net = getattr(teacher, "net", None)
    if isinstance(net, torch.nn.Module) and any(p.grad is not None for p in net.parameters()):
        return False, "a gradient reaches the teacher's weights", "Detach the teacher in the objective."
    parameters = sum(p.numel() for p in mine.net.parameters())
    return True, f"{', '.join(terms)}: {parameters:,} parameters", ""


def _zero(teacher: Model | None, batch: Batch, objective: Any) -> Finding:
    if teacher is None or getattr(objective, "student_features", ()):
        return True, "not applicable", ""
    with torch.no_grad():
        said = teacher(batch)
        terms = objective(said, said, batch)
    values = {name: float(terms[name].abs().max()) for name in terms if name in ("soft_targets", "match_values")}
    worst = max(values.values(), default=0.0)
    shown = ", ".join(f"{name} {value:.1g}" for name, value in values.items()) or "no term that should be 0"
    return worst < 1e-3, shown, "The objective is not a divergence: equal answers must cost nothing."


def _featured(teacher: Any, objective: Any) -> Model:
    wanted = tuple(getattr(objective, "teacher_features", ()))
    return teacher.with_features(wanted) if wanted and hasattr(teacher, "with_features") else teacher


def _tensors(signal: Signal) -> dict[str, Tensor]:
    found = {f"features[{n!r}]": t for n, t in signal.features.items()}
    if signal.values is not None:
        found["values"] = signal.values
    for name in ("values", "hidden", "log_probs"):
        if isinstance(tensor := getattr(signal.logits, name, None), Tensor):
            found["logits"] = tensor
    return found


def estimate(teacher: Model, student: Student, examples: Examples, objective: Any, plan: Plan) -> Estimate:
    """Time, disk and memory of one recording and one training, measured on a few batches of each."""
    batch = _first(examples, plan)
    with torch.no_grad():
        teacher(batch)
        began = time.perf_counter()
        said = _featured(teacher, objective)(batch)
        asking = (time.perf_counter() - began) / len(batch)
    views = max(1, plan.views or 1)
    answer = sum(t.numel() * t.element_size() for t in _tensors(said).values()) / len(batch)
    return Estimate(
        record_seconds=asking * len(examples) * views,
        fit_seconds=_step_seconds(said, student, batch, objective) / len(batch) * plan.batch_size
        * plan.total_steps(len(examples)),
        disk_bytes=int((answer + 32) * len(examples) * views),
        memory_bytes=_memory(student, batch, plan),
    )  # fmt: skip


def _step_seconds(said: Signal, student: Student, batch: Batch, objective: Any) -> float:
    mine = student.copy().with_features(tuple(getattr(objective, "student_features", ())))
    ready, _ = built(objective, mine.predict(batch), said)
    mine.net.train()
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        terms = ready(mine(batch), said, batch)
        torch.stack([values.sum() for values in terms.values()]).sum().backward()
        spent.append(time.perf_counter() - began)
    return sorted(spent)[1]


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

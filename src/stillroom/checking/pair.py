"""What would go wrong later, found before anything long starts: teacher, student, data and objective together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import StillroomError
from stillroom.labels import labelled_batch
from stillroom.objectives import built, counted_positions
from stillroom.plan import Plan, views_of_epoch
from stillroom.students import Student
from stillroom.types import Batch, Dense, Examples, Model, Signal, check_batch_of, identity_of

ASKED = 16  # examples that teacher and student are asked about, at most
POSITIONS = 1024  # and of longer ones, such as rows of tokens, as many as hold so many positions
LOOKED_AT = 256  # examples whose inputs are looked at
LABELLED = 200  # labelled rows that the teacher is scored on, at most
SURE = 0.05  # the probability of as many right answers by guessing the largest class
GUESSES = "Check that its weights are loaded, its class order, and how its inputs are scaled."
Finding = tuple[bool, str, str]  # passed, detail, remedy


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``remedy`` says what to do when it failed."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""


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
    check_batch_of(examples)
    batch = some(examples, ASKED, plan or Plan())
    checks: list[Check] = [_checked("data", lambda: _data(some(examples, LOOKED_AT)))]
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
    except Exception as error:  # a user's own teacher may raise anything; a check that cannot be made has failed
        detail = " ".join(str(error).split())
        shown = detail if isinstance(error, StillroomError) else f"{type(error).__name__}: {detail}"
        return Check(name, False, shown, "Mend this first: the run would stop here too.")
    return Check(name, passed, detail, "" if passed else remedy)


def some(examples: Examples, count: int, plan: Plan | None = None) -> Batch:
    """Up to ``count`` examples from all over the data, as the plan's first epoch shows them (None: unaugmented)."""
    # not the head: data is often sorted by class, and a missing value rarely stands in the first row
    first = examples.batch([0], None)
    positions = 1 if first.mask is None else max(1, first.mask[0].numel())
    count = min(count, max(2, POSITIONS // positions))
    rows = range(0, len(examples), math.ceil(len(examples) / count))
    view = views_of_epoch(plan, examples, 0, None) if plan is not None else None
    return examples.batch(rows, None if view is None else [view] * len(rows))


def _data(batch: Batch) -> Finding:
    remedy = "Look at how the column is read and scaled."
    for name, column in batch.inputs.items():
        if isinstance(column, Tensor):
            if column.is_floating_point() and not bool(column.isfinite().all()):
                row = int((~column.flatten(1).isfinite().all(1)).nonzero()[0])
                return False, f"column {name!r} of example {batch.ids[row]!r} holds NaN or infinity", remedy
            # whole numbers may well be alike (the positions of rows of tokens) beside a column that is not
            told = column.is_floating_point() or len(batch.inputs) == 1
            if told and len(column) > 1 and bool((column == column[:1]).all()):
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
    for name, tensor in tensors_of(first).items():
        if bool(tensor.isnan().any()):
            row = int(tensor.flatten(1).isnan().any(1).nonzero()[0])
            return False, f"{name} for example {batch.ids[row]!r} holds NaN", "Look at that input; try float32."
        if not torch.equal(tensor, tensors_of(again)[name]):
            return (
                False,
                f"{name} differs when the same batch is asked twice",
                "Is dropout on? Call .eval() on its network.",
            )
    # a batch statistic is the same twice, but not in another company: batch normalisation that still trains
    half = slice(0, max(1, len(batch) // 2))
    for name, tensor in tensors_of(teacher(rows_of(batch, half))).items():
        whole = tensors_of(first)[name][half]
        room = 0.02 * max(1.0, float(whole[whole.isfinite()].abs().max())) if whole.isfinite().any() else 0.0
        if tensor.shape == whole.shape and not torch.allclose(tensor, whole, rtol=0.02, atol=room):
            return False, f"{name} depends on which examples share a batch", "Call .eval() on the teacher's network."
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
    # every so many rows: data is often sorted by class, and its head would be one class
    asked = rows_of(batch, slice(None, None, math.ceil(len(batch) / LABELLED)))
    labels = asked.labels if asked.labels is not None else torch.empty(0)
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
    if majority ** len(labels) >= SURE:
        return right / len(labels) >= majority, f"{detail}; too few rows or classes to be sure", GUESSES
    return tail < SURE, detail, GUESSES


def _binomial(k: int, n: int, p: float) -> float:
    if p >= 1:
        return float(k == n)
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    return math.exp(log)


def _gradient(teacher: Model | None, student: Student, batch: Batch, objective: Any) -> Finding:
    mine = student.copy().with_features(tuple(getattr(objective, "student_features", ())))
    mine.net.train()
    with torch.no_grad():
        target = featured(teacher, objective)(batch) if teacher is not None else Signal()
        ready, _ = built(objective, mine.predict(batch), target)
    watched = target.map(lambda t: t.clone().requires_grad_(t.is_floating_point()))
    terms = ready(mine(batch), watched, batch)
    total = torch.stack([values.sum() for values in terms.values()]).sum()
    if not total.requires_grad:
        return False, "no gradient reaches the student", "Does its forward detach, or run under no_grad?"
    if not bool(total.isfinite()):
        return False, f"the objective is {float(total.detach())}", "Look for extreme inputs or answers."
    total.backward()
    blind = [n for n, p in mine.net.named_parameters() if p.requires_grad and p.grad is None]
    if blind:
        return False, f"no gradient reaches {len(blind)} parameters, such as {blind[0]}", "Are they used in forward()?"
    if any(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in tensors_of(watched).values()):
        return False, "a gradient reaches the teacher's answer", "Detach the teacher in the objective."
    if float(total.detach()) > 1e-6 and not any(
        bool(p.grad.any()) for p in mine.net.parameters() if p.grad is not None
    ):
        return False, "the gradient is 0 in every parameter", "Are its inputs all equal, or its units all dead?"
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


def featured(teacher: Any, objective: Any) -> Model:
    """The teacher that also gives the features which the objective needs."""
    wanted = tuple(getattr(objective, "teacher_features", ()))
    return teacher.with_features(wanted) if wanted and hasattr(teacher, "with_features") else teacher


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some examples of a batch."""
    return Batch(
        batch.ids[rows],
        {name: column[rows] for name, column in batch.inputs.items()},
        None if batch.labels is None else batch.labels[rows],
        None if batch.mask is None else batch.mask[rows],
        None if batch.views is None else batch.views[rows],
        {name: value[rows] for name, value in batch.extra.items()},
    )


def tensors_of(signal: Signal) -> dict[str, Tensor]:
    """The tensors of a signal by name, for messages and for their size."""
    found = {f"features[{n!r}]": t for n, t in signal.features.items()}
    if signal.values is not None:
        found["values"] = signal.values
    for name in ("values", "hidden", "log_probs"):
        if isinstance(tensor := getattr(signal.logits, name, None), Tensor):
            found["logits"] = tensor
    return found

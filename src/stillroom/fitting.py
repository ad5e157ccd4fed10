"""Train a student on a teacher's answers: one explicit loop.

It knows models, examples and objectives only by their types; live teachers and recordings are the same to it.
Sums and counts are gathered over micro-batches and ranks and divided once, so how a batch is split changes nothing.
Every random draw is a function of (plan.seed, step), so a resumed run is the same run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn

from stillroom import checkpoint, settings
from stillroom.digests import data_description, json_digest, state_digest
from stillroom.environment import environment
from stillroom.errors import DataError, PairError, SignalError, UsageError, missing_extra
from stillroom.files import claim_folder, write_json
from stillroom.objectives import built, weighted_sum
from stillroom.plan import ALL, Plan, micro_batches, totals_of, weights_of
from stillroom.progress import bar
from stillroom.students.networks import CONFIG, WEIGHTS, Student, describe_student, save_student
from stillroom.types import Batch, Examples, Model, Objective, Signal, check_batch_of, identity_of


@dataclass(frozen=True)
class Step:
    """What a watcher sees of a logged step. Loss and terms are averages over the whole batch, all ranks."""

    step: int
    epoch: float
    loss: float
    terms: Mapping[str, float]
    learning_rate: float
    examples: int


def fit(
    student: Student,
    teacher: Model | None,
    examples: Examples,
    objective: Objective,
    *,
    plan: Plan | None = None,
    folder: str | Path | None = None,
    trackers: Sequence[str] = (),
    watchers: Sequence[Callable[[Step], None]] = (),
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> Student:
    """A trained copy of ``student``; the one passed in keeps its weights. ``teacher=None`` trains it alone.

    With a ``folder``, training can be killed at any time and goes on from its last checkpoint to the same weights, bit
    for bit on one machine; a finished folder is opened, not trained again; a folder of another training is refused.
    ``trackers``: names that Accelerate knows, such as 'tensorboard' (extra ``track``).
    Raises PairError when the teacher does not fit the data or the student, DataError when nothing is labelled or
    counted, SignalError when the loss is not finite (which step).
    """
    folder = Path(folder) if folder else None
    plan = _resolved(plan or Plan(), teacher, examples, objective)
    about = _about(student, teacher, examples, objective, plan)
    if folder is not None:
        claim_folder(folder, CONFIG, {"training": about["training"]}, "training")
        if (folder / WEIGHTS).is_file() and checkpoint.finished(folder):
            return checkpoint.restored(student, folder)
    run = _Run(student, teacher, examples, objective, plan, folder, trackers)
    if folder is not None and run.is_main:
        write_json(folder / CONFIG, {**describe_student(run.student), **about, "complete": False})
    return run.train(about, watchers, checkpoint_seconds, progress)


class _Run:
    """One training under way: the prepared network and optimiser, and where it stands."""

    def __init__(
        self,
        student: Student,
        teacher: Model | None,
        examples: Examples,
        objective: Any,
        plan: Plan,
        folder: Path | None,
        trackers: Sequence[str],
    ) -> None:
        AcceleratorState._reset_state()  # so that one process can fit with one precision after another
        self.accelerator = _accelerator(plan, trackers, folder)
        if getattr(objective, "couples_examples", False) and self.accelerator.num_processes > 1:
            raise UsageError(f"{objective} depends on which examples share a batch: train it on one process.")
        self.plan, self.examples, self.folder = plan, examples, folder
        self.student = student.copy().with_features(tuple(getattr(objective, "student_features", ())))
        wanted = tuple(getattr(objective, "teacher_features", ()))
        self.teacher = teacher.with_features(wanted) if wanted and hasattr(teacher, "with_features") else teacher  # type: ignore[union-attr]
        self.objective, self.learned = self._build(objective)
        parameters = [p for m in (self.student.net, *self.learned) for p in m.parameters() if p.requires_grad]
        if not parameters:
            raise UsageError("the student has no trainable parameter. Check requires_grad.")
        self.net, self.optimiser = self.accelerator.prepare(self.student.net, _optimiser(plan, parameters))
        self.live = dataclasses.replace(self.student, net=self.net)
        self.is_main = self.accelerator.is_main_process
        self.total = plan.total_steps(len(examples))
        self.step, self.seconds, self.history = 0, 0.0, list[dict[str, Any]]()
        self.seen: dict[str, float] = {}
        if trackers:
            self.accelerator.init_trackers("trackers", config=_flat(settings.describe(plan)))

    @property
    def _recorded_views(self) -> Sequence[int] | None:
        return getattr(self.teacher, "views", None)

    def _build(self, objective: Any) -> tuple[Any, list[nn.Module]]:
        """Projectors need shapes, so one small batch is answered by both sides first."""
        if not getattr(objective, "student_features", ()):
            return objective, []
        self.student.net.to(self.accelerator.device)
        ((batch, _),) = micro_batches(
            dataclasses.replace(self.plan, batch_size=2, accumulation=1), self.examples, 0, self._recorded_views
        )
        set_seed(self.plan.seed)
        with torch.no_grad():
            said = self.student.predict(batch)
            target = self.teacher(batch).to(self.accelerator.device) if self.teacher else Signal()
        return built(objective, said, target)

    def train(self, about: dict[str, Any], watchers: Sequence[Any], every: float, progress: bool) -> Student:
        self._resume()
        if hasattr(getattr(self.teacher, "net", None), "eval"):
            self.teacher.net.eval()  # type: ignore[union-attr]
        title = f"fit {self.folder.name if self.folder else self.student.name}"
        logged = max(1, self.total // 200)
        began = saved = time.monotonic()
        with bar(title, self.total, done=self.step, shown=progress and self.is_main) as advance:
            while self.step < self.total:
                last = self.step + 1 == self.total
                row = self._train_step(log=self.step % logged == 0 or last)
                self.step += 1
                if row is not None:
                    self._log(row, watchers)
                advance(1, f"loss {row.loss:.4f}" if row else "")
                if self.folder and not last and time.monotonic() - saved >= every:
                    self._checkpoint(time.monotonic() - began)
                    saved = time.monotonic()
        return self._finish(about, self.seconds + time.monotonic() - began)

    def _train_step(self, log: bool) -> Step | None:
        """One optimiser step on one batch, however it is split."""
        plan, accelerator = self.plan, self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        set_seed(((plan.seed * 1_000_003 + self.step) * 64 + rank) % 2**32)
        batches = micro_batches(plan, self.examples, self.step, self._recorded_views, rank, ranks)
        weights = [weights_of(batch, self.objective, plan.average, weight) for batch, weight in batches]
        totals = self._totals(weights)
        self._check_counts(totals, batches[0][0])
        rate = plan.learning_rate_at(self.step, self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.net.train()
        sums: dict[str, Tensor] = {}
        for number, (batch, _) in enumerate(batches):
            last = number + 1 == len(batches)
            with nullcontext() if last else accelerator.no_sync(self.net):  # ranks exchange gradients once a step
                self._backward(batch, weights[number], totals, sums)
        self._reduce_learned()
        if plan.clip_norm is not None:
            parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
            accelerator.clip_grad_norm_(parameters, plan.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return self._row(sums, rate) if log else None

    def _backward(self, batch: Batch, weights: Mapping[str, Tensor], totals: Mapping[str, float], sums: Any) -> None:
        with torch.no_grad():
            target = self.teacher(batch).to(self.accelerator.device) if self.teacher is not None else Signal()
        with self.accelerator.autocast():
            terms = self.objective(self.live(batch), target, batch)
            loss: Tensor | None = None
            for name, values in terms.items():
                weight = weights.get(name, weights[ALL]).to(values.device)
                term = weighted_sum(values, weight) / max(totals.get(name, totals[ALL]), 1e-12)
                sums[name] = sums.get(name, 0.0) + term.detach()
                loss = term if loss is None else loss + term
        if loss is None:
            raise UsageError(f"{self.objective} returned no terms.")
        # DDP averages over ranks; the division has been done, so the average is made a sum again.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def _totals(self, weights: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        local = totals_of(weights)
        if self.accelerator.num_processes == 1:
            return local
        numbers = torch.tensor(list(local.values()), dtype=torch.float64, device=self.accelerator.device)
        summed: Any = self.accelerator.reduce(numbers, "sum")
        return dict(zip(local, summed.tolist(), strict=True))

    def _check_counts(self, totals: Mapping[str, float], batch: Batch) -> None:
        if totals[ALL] == 0:
            raise DataError(
                f"no position counts in the batch of {list(batch.ids[:3])} and others (its mask is False everywhere). "
                "Check the mask, or leave such examples out."
            )
        for name, total in totals.items():
            self.seen[name] = self.seen.get(name, 0.0) + total
        if self.step + 1 in (self.total, self.plan.steps_per_epoch(len(self.examples))):
            for name, total in self.seen.items():
                if total == 0:
                    raise DataError(f"the term {name!r} counted nothing in a whole epoch: no example is labelled.")

    def _reduce_learned(self) -> None:
        if self.accelerator.num_processes > 1:
            for module in self.learned:
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.grad = self.accelerator.reduce(parameter.grad, "mean")  # type: ignore[assignment]

    def _row(self, sums: Mapping[str, Tensor], rate: float) -> Step:
        values = torch.stack([total.double() for total in sums.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
        terms = dict(zip(sums, values.tolist(), strict=True))  # type: ignore[union-attr]
        loss = math.fsum(terms.values())
        if not math.isfinite(loss):
            raise SignalError(
                f"the loss became {loss} at step {self.step} ({terms}). Lower plan.learning_rate={rate:.3g}, "
                "or check the inputs and the teacher's answers for extreme values (stillroom doctor)."
            )
        epoch = self.step / self.plan.steps_per_epoch(len(self.examples))
        return Step(self.step, epoch, loss, terms, rate, self.step * self.plan.batch_size)

    def _log(self, row: Step, watchers: Sequence[Callable[[Step], None]]) -> None:
        self.history.append(dataclasses.asdict(row))
        self.accelerator.log({"loss": row.loss, "learning_rate": row.learning_rate, **row.terms}, step=row.step)
        for watch in watchers:
            watch(row)

    def _modules(self) -> dict[str, nn.Module]:
        inner = self.accelerator.unwrap_model(self.net)
        return {"net": inner, **{f"learned.{number}": module for number, module in enumerate(self.learned)}}

    def _checkpoint(self, seconds: float) -> None:
        if self.is_main and self.folder is not None:
            spent = self.seconds + seconds
            checkpoint.save(self.folder, self._modules(), self.optimiser, self.step, spent, self.history, self.seen)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = checkpoint.load(self.folder, self._modules(), self.optimiser) if self.folder else None
        if found is not None:
            self.step, self.seconds, self.history, self.seen = found

    def _finish(self, about: Mapping[str, Any], seconds: float) -> Student:
        trained = dataclasses.replace(
            self.student, net=self.accelerator.unwrap_model(self.net).eval(), features=self.student.features
        )
        if self.folder is not None and self.is_main:
            checkpoint.write_history(self.folder, self.history)
            extra = {**about, "complete": True, "steps": self.total, "seconds": round(seconds, 3)}
            save_student(trained, self.folder, {**extra, "environment": environment()})
            checkpoint.discard(self.folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return trained


def _resolved(plan: Plan, teacher: Any, examples: Examples, objective: Any) -> Plan:
    """The plan with nothing left open, and the pairs that cannot work refused."""
    check_batch_of(examples)
    if getattr(objective, "couples_examples", False) and plan.accumulation > 1:
        raise UsageError(
            f"{objective} depends on which examples share a batch, so plan.accumulation={plan.accumulation} would "
            "change it. Set it to 1."
        )
    recorded = getattr(teacher, "views", None)
    if hasattr(teacher, "check_data"):
        teacher.check_data(examples)
    if recorded is not None and plan.views is not None and plan.views > len(recorded):
        raise PairError(f"plan.views={plan.views}, but the recording holds {len(recorded)} views of each example.")
    if recorded is not None and plan.views is None:
        return dataclasses.replace(plan, views=len(recorded))
    if hasattr(teacher, "check_data") and recorded is None and plan.views is None:
        return dataclasses.replace(plan, views=0)
    return plan


def _about(student: Student, teacher: Any, examples: Examples, objective: Any, plan: Plan) -> dict[str, Any]:
    """What trained the student, as student.json says it; ``training`` is the digest of all of it."""
    said = settings.describe(identity_of(teacher)) if teacher is not None else None
    manifest = getattr(teacher, "manifest", None)
    about = {
        "plan": settings.describe(plan),
        "objective": settings.describe(objective),
        "teacher": said,
        "recording": json_digest(manifest) if manifest else None,
        "data": data_description(examples),
        "initial_digest": state_digest(student.net.state_dict()),
    }
    return {**about, "training": json_digest(about)}


def _accelerator(plan: Plan, trackers: Sequence[str], folder: Path | None) -> Accelerator:
    if trackers and folder is None:
        raise UsageError(f"trackers={list(trackers)} need a folder to write to. Pass folder=.")
    precision = "no" if plan.precision == "fp32" else plan.precision
    try:
        return Accelerator(mixed_precision=precision, log_with=list(trackers) or None, project_dir=folder)
    except ImportError as error:
        raise missing_extra(", ".join(trackers), "track") from error


def _optimiser(plan: Plan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if plan.optimiser == "sgd":
        return torch.optim.SGD(
            parameters, lr=plan.learning_rate, momentum=plan.momentum, weight_decay=plan.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, int | float | str | bool)}

"""Train a student on a teacher's answers: one explicit loop.

It knows models, examples and objectives only by their types; live teachers and recordings are the same to it.
Sums and counts are gathered over micro-batches and ranks and divided once, so how a batch is split changes nothing.
Every random draw is a function of (plan.seed, step, rank), so a resumed run is the same run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.environment import environment
from stillroom.errors import DataError, SignalError, UsageError
from stillroom.files import claim_folder, write_json
from stillroom.fitting import checkpoint, sharding
from stillroom.fitting.checkpoint import Step
from stillroom.fitting.devices import (
    accelerator_for,
    finish_trackers,
    optimiser_for,
    over_ranks,
    recompute_activations,
    seed_draws,
    take_step,
)
from stillroom.network import in_evaluation
from stillroom.objectives import built, learns, weighted_sum
from stillroom.plan import (
    ALL,
    OnPolicy,
    Plan,
    check_counts,
    check_finite,
    micro_batches,
    resolved,
    totals_of,
    weights_of,
)
from stillroom.progress import bar
from stillroom.students.networks import CONFIG, Student, describe_student, save_student
from stillroom.types import Batch, Examples, Model, Objective, Signal

ROWS = 200  # of history, at most (and the last step)


def fit(
    student: Student,
    teacher: Model | None,
    examples: Examples,
    objective: Objective,
    *,
    plan: Plan | None = None,
    rollouts: OnPolicy | None = None,
    folder: str | Path | None = None,
    trackers: Sequence[str] = (),
    watchers: Sequence[Callable[[Step], None]] = (),
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> Student:
    """A trained copy of ``student``; the one passed in keeps its weights. ``teacher=None`` trains it alone.

    With a ``folder``, training can be killed at any time and goes on from its last checkpoint to the same weights, bit
    for bit on one machine; a finished folder is opened, not trained again; a folder of another training is refused.
    Splitting a batch (plan.accumulation, ranks of ``accelerate launch``) does not change the result, but for networks
    that draw (dropout) or whose layers mix examples (batch norm).
    ``rollouts`` (stillroom.rollouts.Rollouts): at a share of the steps the student writes the batch itself.
    ``trackers``: names that Accelerate knows, such as 'tensorboard' (extra ``track``), written below the folder.

    Raises FolderError for a folder of another training (what differs; nothing is touched) or a damaged checkpoint,
    PairError when teacher, student and data do not belong together, DataError when nothing is labelled or counted,
    SignalError when the loss is not finite (which step), UsageError for a student that cannot train.
    """
    folder = Path(folder) if folder else None
    plan = resolved(plan or Plan(), student.classes, teacher, examples, objective, student.tokenizer)
    rollouts = rollouts and rollouts.joined(student, teacher, objective)
    about = checkpoint.about(student, teacher, examples, objective, plan, rollouts)
    if getattr(objective, "needs_labels", False) and about["data"]["labelled"] == 0:
        raise DataError(f"{objective} needs labels, and none of the {len(examples)} examples has one.")
    if folder is not None:
        claim_folder(folder, CONFIG, about, "training")
        if checkpoint.finished(folder):
            return checkpoint.restored(student, folder)
    run = _Run(student, teacher, examples, objective, plan, rollouts, folder, trackers)
    if folder is not None and run.accelerator.is_main_process:
        write_json(folder / CONFIG, {**describe_student(student), **about, "complete": False})
    try:
        run.train(watchers, checkpoint_seconds, progress)
    except SignalError:
        if not run.shared:  # one rank may fail alone, and the others would wait for it
            run.keep()
        raise
    finally:
        finish_trackers(run.accelerator, folder)
    return run.finish(about)


class _Run:
    """One training under way: the prepared network and optimiser, and where it stands."""

    def __init__(
        self,
        student: Student,
        teacher: Model | None,
        examples: Examples,
        objective: Any,
        plan: Plan,
        rollouts: OnPolicy | None,
        folder: Path | None,
        trackers: Sequence[str],
    ) -> None:
        self.accelerator = accelerator_for(plan, trackers, folder)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        if getattr(objective, "couples_examples", False) and self.ranks > 1:
            raise UsageError(f"{objective} depends on which examples share a batch: train it on one process.")
        self.plan, self.examples, self.folder, self.student = plan, examples, folder, student
        self.rollouts, self.tally = rollouts, rollouts.tally() if rollouts else None
        self.teacher = in_evaluation(teacher, tuple(getattr(objective, "teacher_features", ())))
        self.views: Sequence[int] | None = getattr(teacher, "views", None)
        live = student.copy().with_features(tuple(getattr(objective, "student_features", ())))
        if hasattr(live.adapter, "remembering") and not getattr(examples, "augmented", False):
            live = dataclasses.replace(live, adapter=live.adapter.remembering())  # type: ignore[attr-defined]
        if plan.checkpointing:
            recompute_activations(live.net, True)
        self.objective, self.learned = self._build(objective, live)
        self.shared = sharding.is_shared_out(self.accelerator)
        if self.shared:
            sharding.check_shareable(objective, bool(self.learned))
        own = [p for p in live.net.parameters() if p.requires_grad]
        if not own:
            raise UsageError("the student has no trainable parameter. Check requires_grad.")
        self.parameters = [*own, *(p for module in self.learned for p in module.parameters() if p.requires_grad)]
        self.net, prepared = self.accelerator.prepare(live.net, optimiser_for(plan, self.parameters, self.shared))
        # the wrapper is for the scaler of fp16; it looks for packages on disk at every step
        self.optimiser = prepared if self.accelerator.scaler is not None else prepared.optimizer
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]  # parts of them, maybe
        self.live = dataclasses.replace(live, net=self.net)
        self.total = plan.total_steps(len(examples))
        self.step, self.seconds, self.history = checkpoint.load(folder, self._parts()) if folder else (0, 0.0, [])
        self.began = self.step
        self.seen: dict[str, float] = {}

    def _build(self, objective: Any, live: Student) -> tuple[Any, list[nn.Module]]:
        """Projectors need shapes, so two examples are answered by both sides first."""
        if not learns(objective):
            return objective, []
        live.net.to(self.accelerator.device)
        small = dataclasses.replace(self.plan, batch_size=2, accumulation=1)
        ((batch, _),) = micro_batches(small, self.examples, 0, self.views)
        seed_draws(self.plan.seed, -1, 0, self.accelerator.device)
        return built(objective, live.predict(batch), self._ask(batch, self.teacher))

    def train(self, watchers: Sequence[Callable[[Step], None]], every: float, progress: bool) -> None:
        """The loop. Rows of history are logged now and then, the state is saved ``every`` so many seconds."""
        logged = math.ceil(self.total / ROWS)
        title = f"fit {self.folder.name if self.folder else self.student.name}"
        main = self.accelerator.is_main_process
        earlier, began, saved = self.seconds, time.monotonic(), time.monotonic()
        with bar(title, self.total, done=self.step, shown=progress and main) as advance:
            while self.step < self.total:
                terms = self._train_step()
                last = self.step + 1 == self.total
                row = self._row(terms) if last or self.step % logged == 0 else None
                self.step += 1
                if row is not None:
                    self._log(row, watchers)
                    advance(0, f"loss {row.loss:.4f}" + (self.tally.note() if self.tally else ""))
                advance(1)
                self.seconds = earlier + time.monotonic() - began
                if self.folder and not last and self._is_due(time.monotonic() - saved >= every):
                    self.keep()
                    saved = time.monotonic()

    def keep(self) -> None:
        """Save the state in the folder. Where ranks hold a part each, all of them have to call it."""
        if self.folder is not None:
            main = self.accelerator.is_main_process
            checkpoint.save(self.folder, self._parts(), self.step, self.seconds, self.history, write=main)

    def _is_due(self, mine: bool) -> bool:
        """Whether this rank takes part in a checkpoint: the first alone, or all where each holds a part."""
        if self.shared:
            return sharding.agreed(self.accelerator, mine)
        return mine and self.accelerator.is_main_process

    def _train_step(self) -> dict[str, float]:
        """One optimiser step on one batch, however it is split; this rank's share of each term."""
        plan, accelerator = self.plan, self.accelerator
        seed_draws(plan.seed, self.step, self.rank, accelerator.device)
        batches, side = self._batches()
        weights = [weights_of(batch, side.objective, plan.average, share) for batch, share in batches]
        totals = over_ranks(accelerator, totals_of(weights))  # what each term is divided by
        check_counts(totals, batches[0][0])
        self._check_seen(totals)
        self.net.train()
        sums: dict[str, Tensor] = {}
        for number, (batch, _) in enumerate(batches):
            last = number + 1 == len(batches)
            with nullcontext() if last else accelerator.no_sync(self.net):  # ranks exchange gradients once a step
                self._backward(batch, side, weights[number], totals, sums)
        self._share_gradients()
        norm: Any = accelerator.clip_grad_norm_(self.parameters, plan.clip_norm or math.inf)
        terms = check_finite(sums, sharding.gathered(norm), plan, self.step, self.total)
        take_step(self.optimiser, plan.learning_rate_at(self.step, self.total))
        return terms

    def _batches(self) -> tuple[list[tuple[Batch, float]], Any]:
        """Micro-batches of this rank, and the side whose teacher and objective they are for: rollouts, or the run."""
        plan, rollouts = self.plan, self.rollouts
        if rollouts is None or self.tally is None or not rollouts.due(plan, self.step, self.total):
            return micro_batches(plan, self.examples, self.step, self.views, self.rank, self.ranks), self
        batches = rollouts.batches(self.live, plan, self.step, self.rank, self.ranks)
        self.tally.add(over_ranks(self.accelerator, rollouts.counts(batches)))
        return batches, rollouts

    def _backward(
        self, batch: Batch, side: Any, weights: Mapping[str, Tensor], totals: Mapping[str, float], sums: dict[str, Any]
    ) -> None:
        """Add one micro-batch's gradient, and its part of each term to ``sums``."""
        target = self._ask(batch, side.teacher)
        with self.accelerator.autocast():
            terms = side.objective(self.live(batch), target, batch)
        if not terms:
            raise UsageError(f"{side.objective} returned no terms.")
        loss: Any = 0.0
        for name, values in terms.items():
            weight = weights.get(name, weights[ALL]).to(values.device)
            term = weighted_sum(values, weight) / (totals.get(name, totals[ALL]) or 1.0)  # 0 where nothing is counted
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
            loss = loss + term
        # Ranks are averaged; the division has been done, so the average is made a sum again.
        self.accelerator.backward(loss * self.ranks)

    @torch.no_grad()
    def _ask(self, batch: Batch, teacher: Model | None) -> Signal:
        return Signal() if teacher is None else teacher(batch).to(self.accelerator.device)

    def _check_seen(self, totals: Mapping[str, float]) -> None:
        for name, total in totals.items():
            self.seen[name] = self.seen.get(name, 0.0) + total
        if self.step + 1 - self.began == self.plan.steps_per_epoch(len(self.examples)):
            for name, total in self.seen.items():
                if total == 0:
                    raise DataError(f"the term {name!r} counted nothing in a whole epoch: no example is labelled.")

    def _share_gradients(self) -> None:
        """Average over ranks what DDP does not: the gradients of projectors."""
        if self.ranks == 1:
            return
        if any(p.grad is None for p in self.parameters):
            raise UsageError(
                "the objective does not reach every trainable parameter of the student, and ranks would wait for it. "
                "Set requires_grad=False where nothing is learned, or train on one process."
            )
        for parameter in (p for module in self.learned for p in module.parameters() if p.requires_grad):
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")  # type: ignore[assignment]

    def _row(self, terms: Mapping[str, float]) -> Step:
        terms = over_ranks(self.accelerator, terms)
        seen = self.plan.examples_before(self.step, len(self.examples))
        rate = self.plan.learning_rate_at(self.step, self.total)
        written = self.tally.state_dict() if self.tally else {}
        return Step(self.step, seen / len(self.examples), math.fsum(terms.values()), terms, rate, seen, written)

    def _log(self, row: Step, watchers: Sequence[Callable[[Step], None]]) -> None:
        self.history.append({name: said for name, said in dataclasses.asdict(row).items() if said != {}})
        self.accelerator.log({"loss": row.loss, "learning_rate": row.learning_rate, **row.terms}, step=row.step)
        for watch in watchers:
            watch(row)

    def _parts(self) -> dict[str, Any]:
        """What has a state that the next step depends on."""
        net = self.accelerator.unwrap_model(self.net)
        parts = {"net": net, "optimiser": self.optimiser, "scaler": self.accelerator.scaler, "rollouts": self.tally}
        if self.shared:
            parts |= {"net": sharding.SharedNet(net), "optimiser": sharding.SharedOptimiser(net, self.optimiser)}
        parts |= {f"learned.{number}": module for number, module in enumerate(self.learned)}
        return {name: part for name, part in parts.items() if part is not None}

    def finish(self, about: Mapping[str, Any]) -> Student:
        """The trained student, saved."""
        net = self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)
        if self.shared:
            state, net = sharding.state_of(net), self.student.copy().net
            net.load_state_dict(state)
        if "forward" not in vars(self.student.net):
            vars(net).pop("forward", None)  # unwrapping leaves the class's own method on the instance
        if self.plan.checkpointing:
            recompute_activations(net, False)
        trained = dataclasses.replace(self.student, net=net.eval())
        if self.folder is not None and self.accelerator.is_main_process:
            checkpoint.write_history(self.folder, self.history)
            extra = {**about, "complete": True, "steps": self.total, "seconds": round(self.seconds, 3)}
            extra |= {"written": self.tally.state_dict()} if self.tally else {}
            save_student(trained, self.folder, {**extra, "environment": environment()})
            checkpoint.discard(self.folder)
        self.accelerator.wait_for_everyone()
        return trained

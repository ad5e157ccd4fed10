"""How to train: the settings that change the numbers, and which examples each step sees, however it is split."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from stillroom.digests import key_hash
from stillroom.errors import DataError, PairError, SignalError, UsageError, nearest
from stillroom.language import describe_tokenizer
from stillroom.objectives import counted_positions, position_weights
from stillroom.types import Average, Batch, Examples, Identity, check_batch_of, identity_of

ALL = ""  # the key of the positions that count for every term without a count of its own
Schedule = Literal["constant", "linear", "cosine"]
Optimiser = Literal["adamw", "sgd"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Plan:
    """All that changes the numbers of a training, and nothing else. It is written into the passport as it is.

    Raises UsageError for a setting out of range.
    """

    epochs: float = 10.0  # passes over the examples; ignored when ``steps`` is given
    steps: int | None = None  # optimiser steps
    batch_size: int = 64  # examples per optimiser step, over all micro-batches and ranks
    accumulation: int = 1  # micro-batches per step and rank
    optimiser: Optimiser = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9  # sgd only
    schedule: Schedule = "cosine"
    warmup: float = 0.0  # share of the steps in which the learning rate rises linearly
    clip_norm: float | None = 1.0  # largest gradient norm
    precision: Precision = "fp32"
    checkpointing: bool = False  # compute activations again in backward: a third more time, less memory, same values
    average: Average = "position"
    views: int | None = None  # augmented views of each example, used in turn; None: the recording's, or always fresh
    seed: int = 0

    def _check_kinds(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "views", "seed"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise UsageError(f"plan.{name} is a whole number, not {value!r}.")
        for name in ("epochs", "learning_rate", "weight_decay", "momentum", "warmup", "clip_norm"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
                raise UsageError(f"plan.{name} is a number, not {value!r}.")
        if not isinstance(self.checkpointing, bool):
            raise UsageError(f"plan.checkpointing is true or false, not {self.checkpointing!r}.")

    def __post_init__(self) -> None:
        self._check_kinds()
        for name in ("epochs", "batch_size", "accumulation", "learning_rate", "steps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"plan.{name} must be above 0, not {value}.")
        choices = {"optimiser": Optimiser, "schedule": Schedule, "precision": Precision, "average": Average}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise UsageError(f"plan.{name} is {value!r}{nearest(str(value), get_args(allowed))}")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"plan.warmup={self.warmup} is a share of the steps: choose a number from 0 to 1.")
        if self.accumulation > self.batch_size:
            raise UsageError(f"plan.accumulation={self.accumulation} is more than batch_size={self.batch_size}.")
        for name in ("seed", "weight_decay", "momentum", "views"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"plan.{name} must not be negative, but is {getattr(self, name)}.")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over ``rows`` examples; the last, smaller batch of an epoch is kept."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * self.steps_per_epoch(rows)))

    def steps_per_epoch(self, rows: int) -> int:
        return math.ceil(rows / self.batch_size)

    def examples_before(self, step: int, rows: int) -> int:
        """How many examples were seen before a step, counted from 0."""
        epochs, within = divmod(step, self.steps_per_epoch(rows))
        return epochs * rows + within * self.batch_size

    def learning_rate_at(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0; 'linear' and 'cosine' end near 0."""
        rising = self.warmup * total
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        done = (step - rising) / max(1.0, total - rising)
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.learning_rate * factor[self.schedule]


class OnPolicy(Protocol):
    """What fit asks of rollouts; ``stillroom.rollouts.Rollouts`` is it."""

    teacher: Any  # a Model, who scores
    objective: Any
    tally: Any  # () -> running totals, with add, note, state_dict and load_state_dict
    counts: Any  # (batches) -> what was written

    def joined(self, student: Any, teacher: Any, objective: Any) -> OnPolicy: ...

    def about(self) -> dict[str, Any]: ...

    def due(self, plan: Plan, step: int, total: int) -> bool: ...

    def batches(self, student: Any, plan: Plan, step: int, rank: int, ranks: int) -> list[tuple[Batch, float]]: ...


def resolved(
    plan: Plan,
    classes: tuple[str, ...] | None,
    teacher: Any,
    examples: Examples,
    objective: Any,
    tokenizer: Any = None,
) -> Plan:
    """The plan with nothing left open, once the parts are known to belong together.

    ``classes`` and ``tokenizer``: the student's. Raises PairError for another class order, tokenizer, chat template,
    data or number of views on one side, and UsageError for an objective that the plan would change.
    """
    check_batch_of(examples)
    if getattr(objective, "couples_examples", False) and plan.accumulation > 1:
        raise UsageError(
            f"{objective} depends on which examples share a batch, so plan.accumulation={plan.accumulation} would "
            "change it. Set it to 1."
        )
    others = {"teacher": None if teacher is None else identity_of(teacher).classes, "examples": _classes_of(examples)}
    for whose, order in others.items():
        if classes and order and order != classes:
            raise PairError(
                f"the student has the classes {_short(classes)}, the {whose} {_short(order)}. Number k must mean the "
                "same class on both sides: give both the same order."
            )
    check_tokenizers(tokenizer, teacher, examples)
    if teacher is not None and hasattr(
        teacher, "check_data"
    ):  # a recording: it answers about the data and the views that it holds
        teacher.check_data(examples)
        return dataclasses.replace(plan, views=_recorded_views(plan, teacher.views))
    return plan


def check_tokenizers(tokenizer: Any, teacher: Any, examples: Examples) -> None:
    """Raise PairError unless ids mean the same to student, teacher and examples, and chats are written in one template.

    Equal sizes say nothing: digests are compared, where they are known.
    """
    ours = {} if tokenizer is None else describe_tokenizer(tokenizer)
    who = Identity("") if teacher is None else identity_of(teacher)
    whose = f"the {'recording of' if hasattr(teacher, 'manifest') else 'teacher'} {who.name!r}"
    for what, cure in _SHARED.items():
        said = {
            "the student": ours.get(what),
            whose: getattr(who, what),
            "the examples": getattr(examples, what, None),
        }
        if what == "template" and not said["the examples"]:
            continue  # plain texts, or chats that each side renders for itself
        known = [(side, digest) for side, digest in said.items() if isinstance(digest, str)]
        for side, digest in known[1:]:
            if digest != known[0][1]:
                raise PairError(f"{known[0][0]} has the {what} {known[0][1]}, {side} {digest}. {cure}")


_SHARED = {  # fields of an Identity, and what to do when they differ
    "tokenizer": "The same ids would be other texts. Pack with the teacher's tokenizer and give it to the student, "
    "record again, or distil across tokenizers (stillroom.teachers.across).",
    "template": "Chats would be written otherwise than the model knows them. Pack with Chat(template=the teacher's), "
    "or render each side for itself (stillroom.data.render_apart).",
}


def _recorded_views(plan: Plan, recorded: Sequence[int] | None) -> int:
    if recorded is None:
        if plan.views:
            raise PairError(
                f"plan.views={plan.views}, but the recording holds unaugmented answers only. "
                f"Record with views={plan.views}, or leave plan.views out."
            )
        return 0
    if plan.views is None:
        return len(recorded)
    if not 0 < plan.views <= len(recorded):
        raise PairError(f"plan.views={plan.views}, but the recording holds {len(recorded)} views of each example.")
    return plan.views


def _classes_of(examples: Examples) -> tuple[str, ...] | None:
    found = getattr(examples, "classes", None)
    return tuple(found) if found else None


def _short(classes: tuple[str, ...]) -> str:
    return str(list(classes[:6])) + (f" and {len(classes) - 6} more" if len(classes) > 6 else "")


def micro_batches(
    plan: Plan, examples: Examples, step: int, recorded: Sequence[int] | None = None, rank: int = 0, ranks: int = 1
) -> list[tuple[Batch, float]]:
    """The micro-batches of one rank in one step, each with the weight of its examples.

    The examples of a step follow from (plan.seed, step) alone; ranks and accumulation only share them out. Ranks must
    stay in step, pass by pass: one that gets no example where another does answers one at weight 0.
    """
    epoch, within = divmod(step, plan.steps_per_epoch(len(examples)))
    chosen = _order(plan.seed, epoch, len(examples))[within * plan.batch_size : (within + 1) * plan.batch_size]
    pieces = torch.tensor_split(chosen, ranks * plan.accumulation)
    passes = math.ceil(min(len(pieces), len(chosen)) / ranks)
    mine = [(p.tolist(), 1.0) if len(p) else ([int(chosen[0])], 0.0) for p in pieces[rank::ranks][:passes]]
    views = views_of_epoch(plan, examples, epoch, recorded)
    return [
        (examples.batch(indices, None if views is None else [views] * len(indices)), weight) for indices, weight in mine
    ]


@lru_cache(maxsize=2)  # every step of an epoch asks for it
def _order(seed: int, epoch: int, rows: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(key_hash(f"order|{seed}", epoch)))


def order_digest(plan: Plan, rows: int) -> str:
    """sha256 over the order of a training's examples: the permutation of each epoch, 64-bit little-endian numbers."""
    found = hashlib.sha256()
    for epoch in range(math.ceil(plan.total_steps(rows) / plan.steps_per_epoch(rows))):
        found.update(_order(plan.seed, epoch, rows).numpy().astype("<i8").tobytes())
    return found.hexdigest()


def views_of_epoch(plan: Plan, examples: Examples, epoch: int, recorded: Sequence[int] | None) -> int | None:
    """The view seed that an epoch shows: the recorded ones in turn, or a fresh one; None where nothing is augmented."""
    if plan.views is None:
        return epoch if getattr(examples, "augmented", False) else None
    if plan.views == 0:
        return None
    turn = epoch % plan.views
    return int(recorded[turn]) if recorded else turn


def weights_of(batch: Batch, objective: Any, average: Average, weight: float = 1.0) -> dict[str, Tensor]:
    """The weights [...] of the positions that count, for all terms (ALL) and for each term that counts fewer."""
    counted = {ALL: counted_positions(batch)}
    if hasattr(objective, "counted"):
        counted.update(objective.counted(batch))
    return {name: position_weights(mask, average) * weight for name, mask in counted.items()}


def totals_of(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The sum of the weights over micro-batches: what each term's sum is divided by, once."""
    # in float64, so that the sum does not depend on how the batch is split
    return {name: math.fsum(w[name].sum(dtype=torch.float64).item() for w in weights) for name in sorted(weights[0])}


def check_finite(sums: Mapping[str, Tensor], norm: Tensor, plan: Plan, step: int, total: int) -> dict[str, float]:
    """The terms as numbers, once loss and gradient are known to be finite: before they reach the weights.

    Raises SignalError that says which step.
    """
    *found, size = torch.stack([*(total.float() for total in sums.values()), norm.float()]).tolist()
    terms = dict(zip(sums, found, strict=True))
    # in fp16 a gradient may overflow: the scaler then leaves the step out
    broken = [*found] if plan.precision == "fp16" else [*found, size]
    if all(map(math.isfinite, broken)):
        return terms
    what = f"loss became {math.fsum(found)}" if not math.isfinite(sum(found)) else f"gradient became {size}"
    rate = plan.learning_rate_at(step, total)
    raise SignalError(
        f"the {what} at step {step} ({terms}). Lower plan.learning_rate (here {rate:.3g}), or check the "
        "inputs and the teacher's answers for extreme values."
    )


def check_counts(totals: Mapping[str, float], batch: Batch) -> None:
    """Raises DataError when no position of a whole step counts; ``batch`` is one of its micro-batches."""
    if totals[ALL] == 0:
        raise DataError(
            f"no position counts in the batch of {list(batch.ids[:3])} and others (its mask is False everywhere). "
            "Check the mask, or leave such examples out."
        )

"""How to train: the settings that change the numbers, and which examples each step sees, however it is split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.errors import UsageError
from stillroom.objectives import counted_positions, position_weights
from stillroom.types import Average, Batch, Examples

ALL = ""  # the key of the positions that count for every term without a count of its own


@dataclass(frozen=True)
class Plan:
    """All that changes the numbers of a training, and nothing else. It is written into the passport as it is."""

    epochs: float = 10.0  # passes over the examples; ignored when ``steps`` is given
    steps: int | None = None  # optimiser steps
    batch_size: int = 64  # examples per optimiser step, over all micro-batches and ranks
    accumulation: int = 1  # micro-batches per step and rank
    optimiser: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9  # sgd only
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.0  # share of the steps in which the learning rate rises linearly
    clip_norm: float | None = 1.0  # largest gradient norm
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    average: Average = "position"
    views: int | None = None  # augmented views of each example, used in turn; None: the recording's, or always fresh
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"plan.{name} must be above 0, not {getattr(self, name)}.")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"plan.steps must be at least 1, not {self.steps}.")
        if self.accumulation > self.batch_size:
            raise UsageError(f"plan.accumulation={self.accumulation} is more than batch_size={self.batch_size}.")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over ``rows`` examples; the last, smaller batch of an epoch is kept."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * self.steps_per_epoch(rows)))

    def steps_per_epoch(self, rows: int) -> int:
        return math.ceil(rows / self.batch_size)

    def learning_rate_at(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0; 'linear' and 'cosine' end near 0."""
        rising = self.warmup * total
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        done = (step - rising) / max(1.0, total - rising)
        factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.learning_rate * factor[self.schedule]


def micro_batches(
    plan: Plan, examples: Examples, step: int, recorded: Sequence[int] | None = None, rank: int = 0, ranks: int = 1
) -> list[tuple[Batch, float]]:
    """The micro-batches of one rank in one step, each with the weight of its examples.

    The examples of a step follow from (plan.seed, step) alone; ranks and accumulation only share them out. A rank that
    gets none answers one at weight 0, since ranks must stay in step.
    """
    epoch, within = divmod(step, plan.steps_per_epoch(len(examples)))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(plan.seed * 7919 + epoch))
    chosen = order[within * plan.batch_size : (within + 1) * plan.batch_size]
    pieces = torch.tensor_split(chosen, ranks * plan.accumulation)[rank::ranks]
    mine = [(piece.tolist(), 1.0) for piece in pieces if len(piece)] or [([int(chosen[0])], 0.0)]
    views = views_of_epoch(plan, examples, epoch, recorded)
    return [
        (examples.batch(indices, None if views is None else [views] * len(indices)), weight) for indices, weight in mine
    ]


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
    return {name: math.fsum(float(w[name].sum()) for w in weights) for name in sorted(weights[0])}

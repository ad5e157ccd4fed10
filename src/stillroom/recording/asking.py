"""Asking: which keys there are, the teacher's answer to a batch of them, and the checks of both.

Writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom import settings
from stillroom.digests import examples_digest
from stillroom.errors import DataError, PairError, ShapeError, SignalError, UsageError
from stillroom.recording.codec import Codec, Kept, encode
from stillroom.recording.codecs import LARGEST_SEED
from stillroom.recording.ragged import OFFSETS
from stillroom.recording.rows import Rows
from stillroom.recording.shards import KEY_ARRAYS, UNAUGMENTED
from stillroom.recording.store import FORMAT
from stillroom.types import Batch, Examples, Model, Signal, identity_of


@dataclass(frozen=True, eq=False)
class Job:
    """Who is asked about what. Keys are numbered view by view: key = number of the view * examples + example."""

    teacher: Model
    examples: Examples
    codecs: tuple[Codec, ...]
    views: tuple[int, ...] | None
    batch_size: int
    count: int  # examples

    def __len__(self) -> int:
        return self.count * (1 if self.views is None else len(self.views))

    def batch(self, start: int, stop: int) -> Batch:
        indices = [key % self.count for key in range(start, stop)]
        views = None if self.views is None else [self.views[key // self.count] for key in range(start, stop)]
        batch = self.examples.batch(indices, views)
        if len(batch) != len(indices):
            raise DataError(f"{len(indices)} examples were asked for, and a batch of {len(batch)} came.")
        return batch if views is None else dataclasses.replace(batch, views=tuple(views))

    @torch.no_grad()
    def ask(self, batch: Batch) -> Signal:
        answer = self.teacher(batch)
        if not isinstance(answer, Signal):
            raise SignalError(f"the teacher returned {type(answer).__name__}. A model returns a stillroom Signal.")
        return answer

    @torch.no_grad()
    def keep(self, batch: Batch, once: Rows, answer: Signal | None = None) -> Kept:
        """What is kept of the teacher's ``answer`` (None: asked now), checked. Raises SignalError."""
        views = (UNAUGMENTED,) * len(batch) if self.views is None else batch.views or ()
        keys = list(zip(batch.ids, views, strict=True))
        kept = encode(self.codecs, self.ask(batch) if answer is None else answer, keys, once)
        for name, rows in kept.rows.items():
            if name + OFFSETS not in kept.rows:
                _check_rows(name, rows[1:] if name.endswith(OFFSETS) else rows, batch)
        return kept

    def header(self) -> dict[str, Any]:
        """What the manifest says before anything is asked: the recording's own identity."""
        examples = self.examples
        return {
            "format": FORMAT,
            "teacher": dataclasses.asdict(identity_of(self.teacher)),
            "data": {
                "name": getattr(examples, "name", "unknown"),
                "digest": examples_digest(examples),
                "rows": self.count,
                "licence": getattr(examples, "licence", "unknown"),
                "source": getattr(examples, "source", "unknown"),
            },
            "keep": settings.describe(self.codecs),
            "views": None if self.views is None else list(self.views),
            "batch_size": self.batch_size,
        }


def _check_rows(name: str, rows: Tensor, batch: Batch) -> None:
    if name in KEY_ARRAYS:
        raise UsageError(f"a codec may not name its array {name!r}: a shard has that already.")
    if rows.ndim == 0 or len(rows) != len(batch):
        raise ShapeError(
            f"the teacher's {name} have shape {list(rows.shape)}, but the batch has {len(batch)} examples."
        )
    if not rows.is_floating_point():
        return
    bad = rows.isnan() | (rows.isinf() if "logits." not in name else rows == torch.inf)
    if name.endswith("logits.values"):
        bad |= (rows == -torch.inf).all(-1, keepdim=True)  # every id impossible
    if bad.any():
        row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0, 0])
        raise SignalError(
            f"the teacher's {name} for example {batch.ids[row]!r} hold NaN or infinity. Nothing can be learned from "
            "that: check this example, the teacher's weights and its precision."
        )


def check_request(job: Job, shard_rows: int | None) -> None:
    """Raises what would spoil the recording: a teacher in training mode, other class orders, ids that occur twice."""
    for name, value in (("batch_size", job.batch_size), ("shard_rows", shard_rows)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value} cannot be used: choose a whole number from 1 on.")
    for net in (job.teacher, getattr(job.teacher, "net", None)):
        if isinstance(net, nn.Module) and any(module.training for module in net.modules()):
            raise SignalError(
                "the teacher is in training mode: its dropout and batch statistics would be recorded. "
                "Call .eval() on its network first."
            )
    theirs, ours = identity_of(job.teacher).classes, getattr(job.examples, "classes", None)
    if theirs and ours and theirs != tuple(ours) and sorted(theirs) == sorted(ours):
        raise PairError(f"the teacher's classes are in the order {list(theirs)}, the data's {list(ours)}. Align them.")
    ids = getattr(job.examples, "ids", None)
    if ids is not None and len(set(ids)) < len(ids):
        twice = next(name for number, name in enumerate(ids) if name in ids[:number])
        raise DataError(f"example id {twice!r} occurs twice. Every example needs its own id.")


def as_codecs(keep: Codec | Sequence[Codec]) -> tuple[Codec, ...]:
    """One codec or several, as several. Raises UsageError for what is none."""
    codecs = tuple(keep) if isinstance(keep, list | tuple) else (keep,)
    if not codecs or not all(hasattr(codec, "encode") and hasattr(codec, "decode") for codec in codecs):
        raise UsageError(
            f"keep={keep!r} is no codec. Use Everything(), TopK(k), Hidden(bits), Sampled(n), Features(names), several."
        )
    return codecs  # type: ignore[return-value]


def as_views(views: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The view seeds; a number n means 0 .. n - 1. Raises UsageError for repeated or negative seeds."""
    if views is None:
        return None
    seeds = tuple(range(views)) if isinstance(views, int) else tuple(int(view) for view in views)
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < LARGEST_SEED for seed in seeds):
        raise UsageError(f"views={views!r} cannot be used: give a number from 1 on, or different seeds from 0 on.")
    return seeds

"""Examples and teachers for the tests of recordings: small, local, with nothing but what the protocols ask for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.network import Columns, answer
from stillroom.recording import Recording, record
from stillroom.types import Batch, Dense, Identity, Signal

SOMEONE = Identity("teacher", digest="a" * 64)


def flipped(x: Tensor, view: int) -> Tensor:
    """An augmentation that is drawn from the view seed alone: view 0 leaves the row as it is."""
    return x.flip(-1) + view / 8 if view else x


@dataclass(frozen=True, eq=False)
class Rows:
    """The Examples protocol over one tensor [N, ...]."""

    x: Tensor
    ids: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    name: str = "rows"
    augment: Callable[[Tensor, int], Tensor] | None = None

    @classmethod
    def make(cls, count: int, width: int = 6, seed: int = 0, **rest: object) -> Rows:
        x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
        return cls(x, tuple(f"row-{number}" for number in range(count)), **rest)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Batch:
        x = self.x[list(indices)]
        if views is not None and self.augment is not None:
            x = torch.stack([self.augment(row, view) for row, view in zip(x, views, strict=True)])
        ids = tuple(self.ids[index] for index in indices)
        return Batch(ids, {"x": x}, views=None if views is None else tuple(views))

    def take(self, indices: Sequence[int]) -> Rows:
        return dataclasses.replace(self, x=self.x[list(indices)], ids=tuple(self.ids[index] for index in indices))


@dataclass(frozen=True, eq=False)
class Teacher:
    """Answers by a function of x; elementwise functions answer a row alike in every batch."""

    answer: Callable[[Tensor], Signal]
    identity: Identity = SOMEONE

    def __call__(self, batch: Batch) -> Signal:
        x = batch.inputs["x"]
        assert isinstance(x, Tensor)
        return self.answer(x)


def linear(classes: int = 10, width: int = 6, seed: int = 1) -> Callable[[Tensor], Signal]:
    """Logits [B, classes] from x [B, width], summed so that a row's answer does not depend on its batch."""
    weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
    return lambda x: Signal(logits=Dense((x[:, None, :] * weight).sum(-1)))


class Net:
    """A real network in its batches: matmuls may differ in the last bit between batch sizes."""

    def __init__(self) -> None:
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 10)).eval()

    def __call__(self, batch: Batch) -> Signal:
        return answer(self.net, batch, Columns(), features=("0",))


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of every file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def again(teacher: Teacher, examples: Rows, folder: Path, *args: Any, **rest: Any) -> Recording:
    """Recorded in batches of 5 and shards of 8."""
    return record(teacher, examples, folder, *args, batch_size=5, shard_rows=8, progress=False, **rest)


def small_recording(folder: Path) -> tuple[Recording, Teacher, Rows, Path]:
    """20 examples, with the teacher and examples that made it."""
    teacher, examples = Teacher(linear()), Rows.make(20)
    return again(teacher, examples, folder), teacher, examples, folder

"""Table: examples in named columns, with ids, labels and a seeded augmentation. Knows nothing of models."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from stillroom.data.views import Draws
from stillroom.errors import DataError, UsageError, nearest
from stillroom.labels import labelled_rows
from stillroom.types import UNLABELLED, Batch, Column

Augment = Callable[[Mapping[str, Column], Draws], Mapping[str, Column]]


@runtime_checkable
class LazyColumn(Protocol):
    """A column that is read when a batch needs it, such as images in files."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Column: ...

    def select(self, indices: Sequence[int]) -> LazyColumn: ...


AnyColumn = Column | LazyColumn


@dataclass(frozen=True, eq=False)
class Table:
    """Examples in memory (or lazily read columns). Implements the Examples protocol.

    ``columns``: name -> Tensor [N, ...], tuple of N texts, or a LazyColumn. ``ids``: unique and stable across runs.
    ``labels``: int64 [N] or [N, T] (-100 = unlabelled), indices into ``classes``; or float32 [N, D] (NaN = unlabelled).
    ``mask``: bool [N, T], True where a position counts. ``augment(inputs, draws)`` draws a view of a whole batch.

    Raises DataError for columns of unequal length, repeated ids and labels outside the classes, naming the example.
    """

    columns: Mapping[str, AnyColumn]
    ids: tuple[str, ...]
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    name: str = "examples"
    licence: str = "unknown"
    source: str = "unknown"
    augment: Augment | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "columns", {name: _column(column) for name, column in self.columns.items()})
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))
            _refuse_repeats(self.classes, "class")
        for name, column in self.columns.items():
            if len(column) != len(self.ids):
                raise DataError(f"column {name!r} has {len(column)} rows, but there are {len(self.ids)} ids.")
        _refuse_repeats(self.ids, "id")
        if self.mask is not None and len(self.mask) != len(self.ids):
            raise DataError(f"the mask has {len(self.mask)} rows, but there are {len(self.ids)} ids.")
        if self.labels is not None:
            object.__setattr__(self, "labels", _checked_labels(self.labels, self.ids, self.classes))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def augmented(self) -> bool:
        """True when views differ from the raw inputs."""
        return self.augment is not None

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Batch:
        """These rows as a Batch; ``views``: one seed >= 0 per row that draws its augmentation, None = unaugmented.

        A view depends on (id, seed) only, not on the other rows. Raises DataError for a row that does not exist,
        UsageError for a negative seed (recordings mark unaugmented rows by -1).
        """
        rows = list(indices)
        if rows and not 0 <= min(rows) <= max(rows) < len(self):
            raise DataError(f"row {max(rows)} was asked of {len(self)} rows (0 to {len(self) - 1}).")
        index = torch.tensor(rows, dtype=torch.int64)
        ids = tuple(self.ids[row] for row in rows)
        inputs: Mapping[str, Column] = {name: _take(column, rows, index) for name, column in self.columns.items()}
        if views is not None:
            if len(views) != len(rows) or any(view < 0 for view in views):
                raise UsageError(f"{len(views)} view seeds for {len(rows)} rows; give one seed >= 0 for each row.")
            if self.augment is not None:
                inputs = {**inputs, **self.augment(inputs, Draws.of(ids, views))}
        return Batch(
            ids=ids,
            inputs=inputs,
            labels=None if self.labels is None else self.labels[index],
            mask=None if self.mask is None else self.mask[index],
            views=None if views is None else tuple(int(view) for view in views),
        )

    def select(self, indices: Sequence[int]) -> Table:
        """The same table with these rows only, in this order."""
        rows = list(indices)
        index = torch.tensor(rows, dtype=torch.int64)
        return dataclasses.replace(
            self,
            columns={
                name: column.select(rows) if isinstance(column, LazyColumn) else _take(column, rows, index)
                for name, column in self.columns.items()
            },
            ids=tuple(self.ids[row] for row in rows),
            labels=None if self.labels is None else self.labels[index],
            mask=None if self.mask is None else self.mask[index],
        )

    def labelled(self) -> Table:
        """The rows that have a label."""
        return self.select(labelled_rows(self.labels))

    def without_labels(self) -> Table:
        """The same rows, with every label unknown."""
        if self.labels is None:
            return self
        unknown = float("nan") if self.labels.is_floating_point() else UNLABELLED
        return dataclasses.replace(self, labels=torch.full_like(self.labels, unknown))

    def with_augment(self, augment: Augment | None) -> Table:
        """The same rows with this augmentation."""
        return dataclasses.replace(self, augment=augment)

    def column(self, name: str) -> Column:
        """A whole column. Raises DataError with the nearest name for one that is not there."""
        if name not in self.columns:
            raise DataError(f"there is no column {name!r}{nearest(name, self.columns)}")
        return _take(self.columns[name], range(len(self)), None)


def _take(column: AnyColumn, rows: Sequence[int], index: Tensor | None) -> Column:
    if isinstance(column, Tensor):
        return column if index is None else column[index]
    if isinstance(column, tuple):
        return tuple(column[row] for row in rows)
    return column.read(rows)


def _column(column: AnyColumn) -> AnyColumn:
    if isinstance(column, Tensor | tuple | LazyColumn):
        return column
    return tuple(cast("Sequence[str]", column))


def _refuse_repeats(names: Sequence[str], what: str) -> None:
    if len(set(names)) == len(names):
        return
    name, times = Counter(names).most_common(1)[0]
    first = names.index(name)
    second = names.index(name, first + 1)
    raise DataError(f"{what} {name!r} occurs {times} times (rows {first} and {second}). Give every {what} once.")


def _checked_labels(labels: Tensor, ids: Sequence[str], classes: Sequence[str] | None) -> Tensor:
    if len(labels) != len(ids):
        raise DataError(f"there are {len(labels)} labels for {len(ids)} ids.")
    if labels.is_floating_point():
        return (labels if labels.dim() > 1 else labels[:, None]).float()
    if labels.dtype == torch.bool or labels.is_complex():
        raise DataError(f"labels are {labels.dtype}; give int64 class numbers (-100 = unlabelled) or floats.")
    labels = labels.long()
    largest = len(classes) - 1 if classes else torch.iinfo(torch.int64).max
    wrong = (labels != UNLABELLED) & ((labels < 0) | (labels > largest))
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        allowed = f"0 to {len(classes) - 1}" if classes else "0 or more"
        raise DataError(
            f"example {ids[where[0]]!r} has label {int(labels[where])}; labels are {allowed}, or -100 for unlabelled "
            f"({int(wrong.sum())} wrong in all). Check the class list, and whether labels start at 1."
        )
    return labels

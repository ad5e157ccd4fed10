"""What a question looks like: the raw columns that the student's adapter reads, as a model that checks JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor

from stillroom.errors import DataError
from stillroom.network import Adapter, Columns
from stillroom.types import Batch, Column

LONGEST = 100_000  # characters of a text
SHOWN = 200  # characters of an example in the documentation
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]


@dataclass(frozen=True)
class Raw:
    """One raw column of one example. ``dtype`` None: text. ``shape`` None: numbers of any shape."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None = None
    example: Any = None

    def kind(self) -> Any:
        """The type that pydantic checks."""
        if self.dtype is None:
            return Annotated[str, Field(max_length=LONGEST, examples=[self.example] if self.example else None)]
        if self.shape is None:
            return list[Any]
        found: Any = Number if self.dtype.is_floating_point else Whole
        for size in reversed(self.shape):
            found = Annotated[list[found], Field(min_length=size, max_length=size)]
        return found

    def column(self, values: Sequence[Any]) -> Column:
        """The column of several questions. Raises DataError for numbers that make no tensor."""
        if self.dtype is None:
            return tuple(values)
        try:
            return torch.tensor(values, dtype=self.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.name!r} holds no numbers of one shape ({error}).") from None


class _Watched(Mapping[str, Column]):
    """Inputs that remember which columns were read."""

    def __init__(self, inputs: Mapping[str, Column]) -> None:
        self.inputs, self.read = inputs, dict[str, None]()

    def __getitem__(self, name: str) -> Column:
        self.read[name] = None
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


def raw_columns(adapter: Adapter, example: Batch | None) -> tuple[Raw, ...]:
    """The columns that the adapter reads, from an example; without one, from what the adapter says of itself.

    Raises DataError for an adapter that says nothing where there is no example.
    """
    if example is not None:
        watched = _Watched(example.inputs)
        adapter(watched)
        return tuple(_raw(name, example.inputs[name]) for name in watched.read if name in example.inputs)
    if isinstance(adapter, Columns):
        return tuple(Raw(name, torch.float32) for name in adapter.names)
    column = getattr(adapter, "column", None)
    if isinstance(column, str):
        return (Raw(column, None),)
    raise DataError(
        "the student's adapter does not say which columns it reads: serve where the run's data can be read."
    )


def _raw(name: str, column: Column) -> Raw:
    if isinstance(column, Tensor):
        return Raw(name, column.dtype, tuple(column.shape[1:]), column[0].tolist())
    return Raw(name, None, None, column[0][:SHOWN])


def question_model(columns: Sequence[Raw]) -> type[BaseModel]:
    """{"inputs": {column: value}}, other names refused."""
    strict = ConfigDict(extra="forbid")
    fields: dict[str, Any] = {raw.name: (raw.kind(), ...) for raw in columns}
    inputs = create_model("Inputs", __config__=strict, **fields)
    example = {raw.name: raw.example for raw in columns}
    shown = None if any(value is None for value in example.values()) else [{"inputs": example}]
    config = ConfigDict(extra="forbid", json_schema_extra={"examples": shown} if shown else None)  # type: ignore[arg-type]
    return create_model("Question", __config__=config, inputs=(inputs, ...))


def batch_of(columns: Sequence[Raw], rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Several checked questions as one batch."""
    ids = tuple(str(number) for number in range(len(rows)))
    return Batch(ids, {raw.name: raw.column([row[raw.name] for row in rows]) for raw in columns})

"""The values that pass between stages. Nothing here runs a network or touches a disk.

Dimension letters: B examples, T positions, V vocabulary or classes, K kept entries, D features, S statistics.
The order of arguments is (student, teacher, batch) everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from stillroom.errors import DataError, ShapeError, SignalError

UNLABELLED = -100
Column = Tensor | tuple[str, ...]
Index = Any  # whatever indexes the leading dimensions of a tensor: a slice, a bool mask, an index tensor
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some examples, as raw named columns. Every Model adapts them to its own network."""

    ids: tuple[str, ...]  # stable across runs: the key of a recording
    inputs: Mapping[str, Column]
    labels: Tensor | None = None  # [...] int64 (-100 = unlabelled), or [..., D] float (NaN = unlabelled)
    mask: Tensor | None = None  # [...] bool, True where a position counts
    views: tuple[int, ...] | None = None  # the seed that drew each example's augmentation; part of the key
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in self.inputs.items():
            if len(column) != len(self.ids):
                raise ShapeError(f"column {name!r} has {len(column)} rows, but the batch has {len(self.ids)} ids.")
        if self.views is not None and len(self.views) != len(self.ids):
            raise ShapeError(f"{len(self.views)} view seeds for {len(self.ids)} examples.")

    def __len__(self) -> int:
        return len(self.ids)


class _Logits:
    """What Dense, Projected and Sparse share: positions can be selected, moved and detached."""

    def map(self: T, change: Callable[[Tensor], Tensor]) -> T:
        """The same logits with ``change`` applied to every tensor that has positions as leading dimensions."""
        moved = {
            f.name: change(value)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.name not in ("weight", "bias") and isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def __getitem__(self: T, index: Index) -> T:
        return self.map(lambda tensor: tensor[index])  # type: ignore[attr-defined]

    def detach(self: T) -> T:
        """The same logits without gradient, a head's included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: v.detach() if isinstance(v, Tensor) else v for name, v in fields.items()})


@dataclass(frozen=True, eq=False)
class Dense(_Logits):
    """All logits, values [..., V]. -inf means probability 0."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the positions, without V."""
        return self.values.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]


@dataclass(frozen=True, eq=False)
class Projected(_Logits):
    """Logits that are not computed yet: softcap(scale * (hidden @ weight.T + bias)); never all at once.

    hidden [..., D], weight [V, D], bias [V]. softcap(z) = c tanh(z / c).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def compute(self) -> Tensor:
        """The logits [..., V] of these positions, all of them: select a chunk first."""
        logits = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True, eq=False)
class Sparse(_Logits):
    """K kept entries of V and the tail as one bucket.

    ids [..., K] int64, log_probs [..., K] in nats at temperature 1, rest [...] = log of the mass outside the K entries.
    ``sampled``: ids are independent draws from the teacher (repeats stay separate entries, rest is unused), log_probs
    is the teacher's own log-probability of each draw; valid for forward KL and cross-entropy at temperature 1 only.
    Where a position keeps fewer than K entries, the places that are left repeat its first id with log_probs -inf.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    vocabulary: int
    sampled: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape[:-1]


Logits = Dense | Projected | Sparse


@dataclass(frozen=True, eq=False)
class Signal:
    """What a model answers. Fields that a model does not give are None or empty."""

    logits: Logits | None = None
    values: Tensor | None = None  # continuous answers [..., D]: an embedding, an action, a regression
    features: Mapping[str, Tensor] = field(default_factory=dict)  # named intermediate outputs
    text: tuple[str, ...] | None = None  # what a black box said
    parts: Mapping[str, Signal] = field(default_factory=dict)  # several teachers, by name

    @property
    def given(self) -> tuple[str, ...]:
        """The names of what this signal holds, for error messages."""
        names = [n for n in ("logits", "values", "text") if getattr(self, n) is not None]
        return (*names, *(f"features[{n!r}]" for n in self.features), *(f"parts[{n!r}]" for n in self.parts))

    def need_logits(self, who: str = "this objective") -> Logits:
        """The logits, or a SignalError that says what the model gives instead."""
        if self.logits is None:
            raise SignalError(
                f"{who} needs 'logits', but the model gives {list(self.given)}. "
                "Choose a model (or record again with a keep) that gives logits, or choose another objective."
            )
        return self.logits

    def need_values(self, who: str = "this objective") -> Tensor:
        """The values [..., D], or a SignalError that says what the model gives instead."""
        if self.values is None:
            raise SignalError(
                f"{who} needs 'values', but the model gives {list(self.given)}. "
                "Choose a model that gives values (answers='values'), or choose another objective."
            )
        return self.values

    def map(self, change: Callable[[Tensor], Tensor]) -> Signal:
        """The same signal with ``change`` applied to every tensor (but a Projected head)."""
        return dataclasses.replace(
            self,
            logits=None if self.logits is None else self.logits.map(change),
            values=None if self.values is None else change(self.values),
            features={name: change(value) for name, value in self.features.items()},
            parts={name: part.map(change) for name, part in self.parts.items()},
        )

    def detach(self) -> Signal:
        logits = None if self.logits is None else self.logits.detach()
        return dataclasses.replace(self.map(Tensor.detach), logits=logits)

    def to(self, device: torch.device | str) -> Signal:
        return self.map(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Identity:
    """Who a model is, as far as it is known; what the manifest and the passport say of it. None = unknown."""

    name: str
    digest: str | None = None  # sha256 of the weights' content (digests.state_digest)
    kind: str = "network"  # network, transformers, ensemble, recording, function, ...
    licence: str = "unknown"  # an SPDX id, or 'unknown'
    route: str = "local-weights"  # local-weights | own-account | published-outputs
    source: str = "unknown"  # where the weights came from: a package and version, a hub name, a path's last part
    revision: str | None = None
    classes: tuple[str, ...] | None = None  # the order of its logits
    tokenizer: str | None = None  # sha256 of what its ids mean (language.tokenizer_digest)
    template: str | None = None  # sha256 of its chat template (language.template_digest)
    parts: tuple[Identity, ...] = ()  # the members of an ensemble


@runtime_checkable
class Model(Protocol):
    """Everything that answers. May carry ``identity: Identity``; see ``identity_of``."""

    def __call__(self, batch: Batch, /) -> Signal: ...


class Objective(Protocol):
    """Named, unreduced losses, one number per position, to be averaged over the positions that count.

    May also carry:
    ``counted(batch) -> Mapping[str, Tensor]``  the positions [...] bool that a term counts, where fewer than batch.mask
    ``build(student, teacher) -> Objective``    an nn.Module of the same objective, when it learns (a projector)
    ``student_features``, ``teacher_features``  module paths whose outputs it needs
    ``couples_examples = True``                 its value depends on which examples share a batch: never accumulated
    """

    def __call__(self, student: Signal, teacher: Signal, batch: Batch, /) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Examples(Protocol):
    """The data. What batches it forms is the Plan's decision, not the data's.

    May carry ``ids``, ``classes``, ``name``, ``licence``, ``source`` and ``augmented`` (True when views differ).
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Batch: ...


@dataclass(frozen=True)
class Metric:
    """Per-example statistics [B, S], and how a sample of them becomes one number: so everything bootstraps in one way.

    ``statistics(model's signal, teacher's signal, batch)``; ``finish(statistics [N, S]) -> float``.
    """

    name: str
    statistics: Callable[[Signal, Signal, Batch], Tensor]
    finish: Callable[[Tensor], float]
    higher_is_better: bool | None = True
    against_teacher: bool = False  # True: compares with the teacher, so it is left out of the teacher's own row
    needs_probabilities: bool = False  # True: left out for models whose scores are not probabilities
    unit: str = ""


def identity_of(model: object) -> Identity:
    """A model's Identity; a plain function has its name and 'unknown' for the rest."""
    found = getattr(model, "identity", None)
    if isinstance(found, Identity):
        return found
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return Identity(name=name, kind="function", route="unknown")


def as_logits(value: Logits | Tensor) -> Logits:
    """A Tensor means Dense."""
    return Dense(value) if isinstance(value, Tensor) else value


def positions(batch: Batch, shape: torch.Size, device: torch.device) -> Tensor:
    """batch.mask broadcast to ``shape`` [...] bool; all True where there is no mask.

    Raises ShapeError when the mask does not fit.
    """
    if batch.mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    mask = batch.mask.to(device=device, dtype=torch.bool)
    if mask.shape != shape:
        raise ShapeError(f"the mask has shape {list(mask.shape)}, but the answers have positions {list(shape)}.")
    return mask


def slice_signal(signal: Signal, index: Index) -> Signal:
    """The signal of some of the examples."""
    chosen = signal.map(lambda tensor: tensor[index])
    if signal.text is None:
        return chosen
    rows = torch.arange(len(signal.text))[index].tolist()
    return dataclasses.replace(chosen, text=tuple(signal.text[row] for row in rows))


def check_batch_of(examples: Examples) -> int:
    """len(examples), refusing an empty set."""
    if len(examples) == 0:
        raise DataError("there are no examples (0 rows). Check the path, the split and the filter.")
    return len(examples)


Average = Literal["position", "example"]

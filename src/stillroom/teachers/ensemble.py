"""Several teachers as one: their mean, and each one's own answer beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.digests import json_digest
from stillroom.errors import PairError, ShapeError, SignalError, UsageError
from stillroom.types import Batch, Dense, Identity, Model, Signal, identity_of

Mean = Literal["probabilities", "logits"]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """See ``ensemble``. Asks each member and answers with their mean; the members' own answers are in ``parts``."""

    members: Mapping[str, Model]
    weights: Mapping[str, float]  # sum to 1
    mean: Mean
    identity: Identity

    def __call__(self, batch: Batch) -> Signal:
        parts = {name: member(batch) for name, member in self.members.items()}
        logits = [_dense(part, name) for name, part in parts.items() if part.logits is not None]
        values = [part.values for part in parts.values() if part.values is not None]
        if len(logits) not in (0, len(parts)) or len(values) not in (0, len(parts)) or not (logits or values):
            given = {name: list(part.given) for name, part in parts.items()}
            raise SignalError(f"the members of an ensemble answer with different things: {given}.")
        return Signal(
            logits=Dense(self._mean_logits(logits)) if logits else None,
            values=self._weighted(values) if values else None,
            parts=parts,
        )

    def _mean_logits(self, logits: list[Tensor]) -> Tensor:
        if self.mean == "logits":
            return self._weighted(logits)
        shares = torch.tensor([math.log(w) if w > 0 else -math.inf for w in self.weights.values()])
        _same_shape(logits)
        stacked = torch.stack([tensor.float().log_softmax(-1) for tensor in logits])
        return (stacked + shares.to(stacked.device).view(-1, *[1] * logits[0].dim())).logsumexp(0)

    def _weighted(self, tensors: list[Tensor]) -> Tensor:
        _same_shape(tensors)
        return torch.stack([w * t.float() for w, t in zip(self.weights.values(), tensors, strict=True)]).sum(0)


def ensemble(
    *teachers: Model | Mapping[str, Model], weights: Mapping[str, float] | None = None, mean: Mean = "probabilities"
) -> Ensemble:
    """One teacher from several, named or not: ``ensemble({"a": a, "b": b}, weights={"a": 2, "b": 1})``.

    ``mean='probabilities'``: log of the weighted mean of the members' probabilities (a mixture); ``'logits'``: the
    weighted mean of their logits (a product of experts, up to a constant). Values are averaged. Weights are scaled to
    sum to 1. Each member's own answer is kept in ``signal.parts``.
    Raises PairError when two members order their classes differently, UsageError for weights that do not fit.
    """
    members = _named(teachers)
    given = dict(weights) if weights is not None else dict.fromkeys(members, 1.0)
    if set(given) != set(members):
        raise UsageError(f"the weights name {sorted(given)}, but the members are {sorted(members)}.")
    if any(not 0 <= w < math.inf for w in given.values()) or sum(given.values()) == 0:
        raise UsageError(f"the weights of an ensemble are finite, not negative and not all 0: {given}.")
    if mean not in ("probabilities", "logits"):
        raise UsageError(f"mean is {mean!r}; choose 'probabilities' or 'logits'.")
    scaled = {name: given[name] / sum(given.values()) for name in members}
    who = {name: identity_of(member) for name, member in members.items()}
    orders = {name: i.classes for name, i in who.items() if i.classes is not None}
    if len(set(orders.values())) > 1:
        raise PairError(f"the members order their classes differently: {orders}. Reorder the logits of one of them.")
    digests = {name: [i.digest, scaled[name]] for name, i in who.items()}
    known = all(i.digest is not None for i in who.values())
    licences = sorted({i.licence for i in who.values()})
    routes = {i.route for i in who.values()}
    identity = Identity(
        name=" + ".join(members),
        digest=json_digest({"mean": mean, "members": digests}) if known else None,
        kind="ensemble",
        licence=licences[0] if len(licences) == 1 else " AND ".join(licences),
        route=routes.pop() if len(routes) == 1 else "unknown",
        source="its members",
        classes=next(iter(orders.values()), None),
        parts=tuple(who.values()),
    )
    return Ensemble(members, scaled, mean, identity)


def _named(teachers: tuple[Model | Mapping[str, Model], ...]) -> dict[str, Model]:
    members: dict[str, Model] = {}
    for teacher in teachers:
        if isinstance(teacher, Mapping):
            members |= teacher
        else:
            name, times = identity_of(teacher).name, 1
            while name in members:
                times += 1
                name = f"{identity_of(teacher).name}#{times}"
            members[name] = teacher
    if len(members) < 2:
        raise UsageError(f"an ensemble has two members or more, not {len(members)}.")
    return members


def _dense(part: Signal, name: str) -> Tensor:
    if not isinstance(part.logits, Dense):
        raise SignalError(
            f"the member {name!r} answers with {type(part.logits).__name__} logits; an ensemble needs all."
        )
    return part.logits.values


def _same_shape(tensors: list[Tensor]) -> None:
    shapes = [list(tensor.shape) for tensor in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise ShapeError(f"the members of an ensemble answer with different shapes: {shapes}.")

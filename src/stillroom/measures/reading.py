"""What logits of any kind say: the top ids, their probability, the label's log-probability, the entropy. Shapes [...].

``read`` gets all of it in one pass over the logits of the positions that count; the metrics of a report share it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.divergences import cross_entropy
from stillroom.types import UNLABELLED, Batch, Dense, Logits, Projected, Sparse, positions

FEW = 5  # how many of the most probable ids are kept
_CHUNK = 1 << 24  # logits computed at once from a Projected: 64 MB in float32


@dataclass(frozen=True, eq=False)
class Read:
    """What a model says at the n positions that count."""

    top: Tensor  # [n] the most probable id
    few: Tensor  # [n, FEW] the most probable ids, in order
    confidence: Tensor  # [n] the probability of the most probable id
    entropy: Tensor  # [n] nats
    label_log_probs: Tensor | None  # [n] nats; None without labels of these positions


_already: weakref.WeakKeyDictionary[Logits, tuple[weakref.ref[Batch], Read]] = weakref.WeakKeyDictionary()


def counted_of(batch: Batch, logits: Logits) -> Tensor:
    """Positions [...] bool that count: unmasked, and labelled where labels are for these positions."""
    device = device_of(logits)
    counted = positions(batch, logits.shape, device)
    if not _has_labels(batch, logits):
        return counted
    return counted & (_labels(batch).to(device) != UNLABELLED)


def read(logits: Logits, batch: Batch) -> Read:
    """One pass over the logits of the counted positions of a batch; asked again, the same answer without a pass."""
    known = _already.get(logits)
    if known is not None and known[0]() is batch:
        return known[1]
    counted = counted_of(batch, logits)
    labels = _labels(batch).to(counted.device)[counted] if _has_labels(batch, logits) else None
    found = _read(logits[counted], labels)
    _already[logits] = weakref.ref(batch), found
    return found


def device_of(logits: Logits) -> torch.device:
    """Where the logits' positions lie."""
    tensor = {Dense: "values", Projected: "hidden", Sparse: "ids"}[type(logits)]
    return getattr(logits, tensor).device


def top_of(logits: Logits) -> tuple[Tensor, Tensor]:
    """The most probable id [...] int64 and its probability [...] float.

    Sparse: among the kept entries, or draws (right unless the top id was never drawn).
    """
    if isinstance(logits, Sparse):
        best, place = logits.log_probs.max(-1)
        return logits.ids.gather(-1, place.unsqueeze(-1)).squeeze(-1), best.exp()
    ids, log_probs = _by_chunks(logits, _top_rows)
    return ids.long(), log_probs.exp()


def label_log_probs(logits: Logits, labels: Tensor) -> Tensor:
    """The log-probability of the label [...] in nats; labels [...] int64 must be ids.

    Sparse: a label outside the K entries gets an equal share of the tail's mass. NaN for sampled draws, where the
    probability of what was not drawn is unknown.
    """
    if not isinstance(logits, Sparse):
        return -cross_entropy(logits, labels)
    if logits.sampled:
        return torch.full_like(logits.rest, float("nan"))
    kept = logits.ids == labels.unsqueeze(-1)
    inside = logits.log_probs.masked_fill(~kept, float("-inf")).amax(-1)
    outside = logits.rest - torch.tensor(max(1, logits.vocabulary - logits.ids.shape[-1])).log().to(logits.rest)
    return torch.where(kept.any(-1), inside, outside)


def entropy_of(logits: Logits) -> Tensor:
    """The entropy [...] in nats. Sparse: of the K entries with the tail as one bucket, a lower bound. NaN for draws."""
    if isinstance(logits, Sparse):
        if logits.sampled:
            return torch.full_like(logits.rest, float("nan"))
        return _entropy_rows(torch.cat([logits.log_probs, logits.rest.unsqueeze(-1)], -1))
    (entropy,) = _by_chunks(logits, lambda rows: (_entropy_rows(rows.log_softmax(-1)),))
    return entropy


def _read(logits: Logits, labels: Tensor | None) -> Read:
    if isinstance(logits, Sparse):
        top, confidence = top_of(logits)
        best = logits.log_probs.topk(min(FEW, logits.log_probs.shape[-1]), -1).indices
        likely = None if labels is None else label_log_probs(logits, labels)
        return Read(top, logits.ids.gather(-1, best), confidence, entropy_of(logits), likely)
    asked = torch.full(logits.shape, UNLABELLED, device=device_of(logits)) if labels is None else labels.long()
    top, few, best, entropy, likely = _by_chunks(logits, _all_rows, asked)
    return Read(top, few, best.exp(), entropy, None if labels is None else likely)


def _all_rows(rows: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """A label that is no id of these logits has probability 0."""
    top, best = _top_rows(rows)
    few = rows.topk(min(FEW, rows.shape[-1]), -1).indices
    log_probs = rows.log_softmax(-1)
    known = (labels >= 0) & (labels < rows.shape[-1])
    likely = log_probs.gather(-1, labels.masked_fill(~known, 0).unsqueeze(-1)).squeeze(-1)
    return top, few, best, _entropy_rows(log_probs), likely.masked_fill(~known, float("-inf"))


def _entropy_rows(log_probs: Tensor) -> Tensor:
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1)


def _top_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    best, place = rows.max(-1)
    return place, best - rows.logsumexp(-1)


def _by_chunks(
    logits: Dense | Projected, rows: Callable[..., tuple[Tensor, ...]], *columns: Tensor
) -> tuple[Tensor, ...]:
    """``rows`` of float32 (or wider) logits [n, V] and columns [n] -> values [n, ...], never all logits at once."""
    shape = logits.shape
    flat = logits.map(lambda tensor: tensor.reshape(-1, tensor.shape[-1]))
    columns = tuple(column.reshape(-1) for column in columns)
    size = max(1, _CHUNK // logits.vocabulary)
    pieces = []
    for start in range(0, max(1, flat.shape[0]), size):
        part = slice(start, start + size)
        piece = flat[part]
        values = piece.compute() if isinstance(piece, Projected) else piece.values
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        pieces.append(rows(values, *(column[part] for column in columns)))
    return tuple((found := torch.cat(parts)).reshape(*shape, *found.shape[1:]) for parts in zip(*pieces, strict=True))


def _has_labels(batch: Batch, logits: Logits) -> bool:
    return batch.labels is not None and not batch.labels.is_floating_point() and batch.labels.shape == logits.shape


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None
    return batch.labels

"""What logits of any kind say: the top id, its probability, the label's log-probability, the entropy. Shapes [...]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.divergences import cross_entropy
from stillroom.types import Dense, Logits, Projected, Sparse

_CHUNK = 1 << 24  # logits computed at once from a Projected: 64 MB in float32


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


def _entropy_rows(log_probs: Tensor) -> Tensor:
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1)


def _top_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    best, place = rows.max(-1)
    return place, best - rows.logsumexp(-1)


def _by_chunks(logits: Dense | Projected, rows: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``rows`` of float32 (or wider) logits [n, V] -> values [n], over all positions, never all logits at once."""
    shape = logits.shape
    flat = logits.map(lambda tensor: tensor.reshape(-1, tensor.shape[-1]))
    size = max(1, _CHUNK // logits.vocabulary)
    pieces = []
    for start in range(0, max(1, flat.shape[0]), size):
        piece = flat[start : start + size]
        values = piece.compute() if isinstance(piece, Projected) else piece.values
        pieces.append(rows(values.to(torch.promote_types(values.dtype, torch.float32))))
    return tuple(torch.cat(parts).reshape(shape) for parts in zip(*pieces, strict=True))

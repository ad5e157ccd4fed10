"""How faithful a recording is: answers that the teacher gives again, against what was kept of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.divergences import forward_kl, total_variation
from stillroom.recording.rows import CHUNK
from stillroom.types import Batch, Dense, Logits, Projected, Signal, Sparse


@dataclass
class Fidelity:
    """Sums over the compared positions; None in ``summary`` where a number does not apply.

    kl: KL(teacher || recorded), nats per position. total_variation: 0 to 1. largest_difference: of values and
    features. The tail of a top-k recording is spread evenly over the ids that were not kept. Of sampled draws, the
    total variation is that of the drawn frequencies (unbiased, it falls as 1/sqrt(n)), and there is no KL.
    """

    examples: int = 0
    kl: float = 0.0
    total_variation: float = 0.0
    kl_positions: int = 0
    variation_positions: int = 0
    largest_difference: float | None = None

    def add(self, live: Signal, kept: Signal, batch: Batch) -> None:
        """``live`` is what the teacher says of the batch now, ``kept`` what the recording says."""
        if kept.logits is not None and live.logits is not None:
            self._add_logits(live.logits, kept.logits, batch)
        pairs = [(live.features[name], tensor) for name, tensor in kept.features.items()]
        if kept.values is not None and live.values is not None:
            pairs.append((live.values, kept.values))
        for said, recorded in pairs:
            difference = (said.detach().cpu().double() - recorded.double()).abs()
            if difference.numel():
                self.largest_difference = max(self.largest_difference or 0.0, float(difference.max()))
        for name, part in kept.parts.items():
            self.add(live.parts[name], part, batch)

    def _add_logits(self, live: Logits, kept: Logits, batch: Batch) -> None:
        if isinstance(live, Sparse) and live.sampled:
            return
        counts = batch.mask if batch.mask is not None and batch.mask.shape == kept.shape else None
        chosen = torch.ones(kept.shape, dtype=torch.bool) if counts is None else counts.bool().cpu()
        where = chosen.flatten().nonzero()[:, 0]
        for rows in where.split(max(1, CHUNK // kept.vocabulary)):
            said, recorded = _dense(_flat(live, rows)), _dense(_flat(kept, rows))
            self.total_variation += float(total_variation(recorded, said).double().sum())
            self.variation_positions += len(rows)
            if not (isinstance(kept, Sparse) and kept.sampled):
                self.kl += float(forward_kl(recorded, said).double().sum())
                self.kl_positions += len(rows)

    def summary(self) -> dict[str, float | int | None]:
        return {
            "examples": self.examples,
            "kl": _mean(self.kl, self.kl_positions),
            "total_variation": _mean(self.total_variation, self.variation_positions),
            "largest_difference": self.largest_difference,
        }


def _mean(total: float, count: int) -> float | None:
    # Rounding may leave a sum of zeros a hair below 0.
    return max(0.0, total / count) if count and math.isfinite(total) else None


def _flat(logits: Logits, rows: Tensor) -> Logits:
    positions = len(logits.shape)
    return logits.map(lambda tensor: tensor.detach().flatten(0, positions - 1)[rows.to(tensor.device)])


def _dense(logits: Logits) -> Dense:
    """All ids, [n, V]: a tail spread evenly, draws as their frequencies."""
    if isinstance(logits, Projected):  # computed where its head lies
        return Dense(logits.compute().cpu())
    logits = logits.map(Tensor.cpu)
    if isinstance(logits, Dense):
        return logits
    shape = (*logits.shape, logits.vocabulary)
    ids = logits.ids.long()
    if logits.sampled:
        each = torch.full(ids.shape, 1 / ids.shape[-1])
        return Dense(torch.zeros(shape).scatter_add_(-1, ids, each).log())
    unkept = logits.vocabulary - ids.shape[-1]
    tail = logits.rest.float() - math.log(unkept) if unkept else torch.full(logits.shape, -torch.inf)
    return Dense(tail[..., None].expand(shape).scatter(-1, ids, logits.log_probs.float()))

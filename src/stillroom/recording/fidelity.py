"""How faithful a recording is: answers that the teacher gives again, against what was kept of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stillroom.divergences import forward_kl, total_variation
from stillroom.types import Batch, Dense, Logits, Projected, Signal, Sparse

CHUNK = 1 << 23  # logits of which several tables are held at once: 32 MiB each in float32
REFERENCE = 2.0  # the student whose gradient is compared: the teacher at this temperature


@dataclass
class Fidelity:
    """Sums over the compared positions; None in ``summary`` where a number does not apply.

    kl: KL(teacher || recorded), nats per position. total_variation: 0 to 1. largest_difference: of values and
    features. The tail of a top-k recording is spread evenly over the ids that were not kept. Of sampled draws, the
    total variation is that of the drawn frequencies (unbiased, it falls as 1/sqrt(n)), and there is no KL.

    gradient_bias: the error of the mean gradient of forward KL in the logits, |mean(t - p)| / |mean(q - p)|. p is the
    teacher; q, the teacher at temperature 2, stands for a student; t is what the recording trains towards: the tail is
    one bucket, within which a student keeps its own shape. It says what is left when errors average out.
    """

    examples: int = 0
    kl: float = 0.0
    total_variation: float = 0.0
    kl_positions: int = 0
    variation_positions: int = 0
    largest_difference: float | None = None
    positions: int = 0  # of one answer
    gradients: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of V: sums of t - p and q - p [V]

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
        self.positions = max(self.positions, kept.shape[1:].numel())
        counts = batch.mask if batch.mask is not None and batch.mask.shape == kept.shape else None
        chosen = torch.ones(kept.shape, dtype=torch.bool) if counts is None else counts.bool().cpu()
        where = chosen.flatten().nonzero()[:, 0]
        for rows in where.split(max(1, CHUNK // kept.vocabulary)):
            said, given = _dense(_flat(live, rows)), _flat(kept, rows)
            recorded = _dense(given)
            self.total_variation += float(total_variation(recorded, said).double().sum())
            self.variation_positions += len(rows)
            if not (isinstance(kept, Sparse) and kept.sampled):
                self.kl += float(forward_kl(recorded, said).double().sum())
                self.kl_positions += len(rows)
            self._add_gradients(said.values.float(), given, recorded)

    def _add_gradients(self, said: Tensor, given: Logits, recorded: Dense) -> None:
        teacher, student = said.softmax(-1), (said / REFERENCE).softmax(-1)
        target = recorded.values.float().softmax(-1)
        if isinstance(given, Sparse) and not given.sampled:
            target = torch.zeros_like(target).scatter_add_(-1, given.ids, given.log_probs.float().exp())
            tail = student.scatter(-1, given.ids, 0.0)
            target += tail * (given.rest.float().exp() / tail.sum(-1).clamp_min(1e-30)).unsqueeze(-1)
        zero = torch.zeros(said.shape[-1], dtype=torch.float64)
        wrong, whole = self.gradients.get(said.shape[-1], (zero, zero))
        self.gradients[said.shape[-1]] = (
            wrong + (target - teacher).double().sum(0),
            whole + (student - teacher).double().sum(0),
        )

    def summary(self, size: int, answers: int) -> dict[str, float | int | None]:
        """``size`` is the bytes of all shards, which hold so many ``answers``."""
        wrong, whole = (math.hypot(*(float(pair[n].norm()) for pair in self.gradients.values())) for n in (0, 1))
        return {
            "examples": self.examples,
            "kl": _mean(self.kl, self.kl_positions),
            "total_variation": _mean(self.total_variation, self.variation_positions),
            "gradient_bias": wrong / whole if whole > 1e-6 * self.variation_positions else None,
            "bytes_per_position": size / (answers * self.positions) if self.positions else None,
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
    first = torch.arange(ids.shape[-1]) == 0
    unused = (ids == ids[..., :1]) & ~first  # padding: written as its first id, so that it changes nothing
    log_probs = torch.where(unused, logits.log_probs[..., :1], logits.log_probs).float()
    unkept = logits.vocabulary - (~unused).sum(-1)
    tail = torch.where(unkept > 0, logits.rest.float() - unkept.log(), -torch.inf)
    return Dense(tail[..., None].expand(shape).scatter(-1, ids, log_probs))

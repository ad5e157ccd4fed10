"""Hidden: the teacher's last hidden states in few bits, and its head once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import SignalError, UsageError
from stillroom.recording.codec import Kept
from stillroom.recording.packing import pack, unpack
from stillroom.recording.rows import Facts, Key, Rows, check_numbers, round_to, widened
from stillroom.types import Projected, Signal

BITS = (4, 6, 8, 16)


@dataclass(frozen=True)
class Hidden:
    """The last hidden states, quantised to ``bits``; the head is kept once, as it is. All logits can be computed.

    Every channel of every example has its own range: h ~ low + step code, with code from 0 to 2**bits - 1. So an
    outlier costs its own channel and example alone, and nothing depends on the order of asking. Per position D bits / 8
    bytes, and per example 4D: for T positions 4D / T more. 16 bits are plain float16.

    Needs a teacher with Projected logits. The closest to the teacher after Everything; TopK and Likely are smaller,
    and training reads them without the teacher's head (docs/formats.md has the figures).
    """

    bits: Literal[4, 6, 8, 16] = 8

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"{self}: bits must be one of {list(BITS)}.")

    def prepare(self, signal: Signal) -> dict[str, Tensor]:
        """The head: weight [V, D], bias [V] where there is one; in the teacher's own precision."""
        logits = self._projected(signal)
        head = {"head.weight": logits.weight.detach().cpu()}
        return head if logits.bias is None else head | {"head.bias": logits.bias.detach().cpu()}

    def encode(self, signal: Signal, keys: Sequence[Key], once: Rows) -> Kept:
        logits = self._projected(signal)
        if list(logits.weight.shape) != list(once["head.weight"].shape):
            raise SignalError(f"keep={self}: the teacher's head changed its shape between two batches.")
        hidden = check_numbers(logits.hidden.detach().cpu().float(), "last hidden state", keys)
        facts: dict[str, Any] = {"softcap": logits.softcap, "scale": float(logits.scale)}
        if self.bits == 16:
            return Kept({"logits.hidden": round_to(hidden, "float16", "last hidden state", keys)}, {"logits": facts})
        facts["shape"] = list(hidden.shape[1:])
        flat = hidden.reshape(len(hidden), -1, hidden.shape[-1])
        low = round_to(flat.amin(1), "float16", "last hidden state", keys)
        span = (flat.amax(1) - low.float()).clamp_min(0)
        step = round_to(span / (2**self.bits - 1), "float16", "last hidden state", keys).clamp_min(2**-24)
        codes = ((flat - low.float()[:, None]) / step.float()[:, None]).round().clamp(0, 2**self.bits - 1)
        packed = [pack(row.flatten().to(torch.int32).numpy(), self.bits) for row in codes]
        rows = {"logits.codes": torch.from_numpy(np.stack(packed)), "logits.low": low, "logits.step": step}
        return Kept(rows, {"logits": facts})

    def decode(self, rows: Rows, facts: Facts, once: Rows) -> Signal:
        about = facts["logits"]
        hidden = widened(rows["logits.hidden"]) if self.bits == 16 else self._dequantised(rows, about["shape"])
        bias = once.get("head.bias")
        head = Projected(hidden, once["head.weight"], bias, about["softcap"], about["scale"])
        return Signal(logits=head)

    def _dequantised(self, rows: Rows, shape: Sequence[int]) -> Tensor:
        codes, width = rows["logits.codes"].numpy(), shape[-1]
        count = int(np.prod(shape))
        found = np.empty((len(codes), count), np.float32)
        for number, row in enumerate(codes):
            found[number] = unpack(row, count, self.bits)
        flat = torch.from_numpy(found).view(len(codes), count // width, width)
        flat.mul_(rows["logits.step"].float()[:, None]).add_(rows["logits.low"].float()[:, None])
        return flat.view(len(codes), *shape)

    def _projected(self, signal: Signal) -> Projected:
        logits = signal.need_logits(f"keep={self}")
        if isinstance(logits, Projected):
            return logits
        raise SignalError(
            f"keep={self} needs the last hidden state and the head (Projected logits), but the teacher gives "
            f"{type(logits).__name__} logits. Keep TopK, Likely or Everything."
        )

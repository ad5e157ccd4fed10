"""Likely: every id that the teacher finds likely enough, so few where it is sure and many where it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import SignalError, UsageError
from stillroom.recording import coding
from stillroom.recording.codec import Kept, check_bits, check_count
from stillroom.recording.levels import Entries, pack_entries, to_entries, unpack_entries
from stillroom.recording.ragged import lay, split
from stillroom.recording.rows import Facts, Key, Rows, check_numbers, log_softmax, over_positions, sparse_of
from stillroom.types import Signal, Sparse


@dataclass(frozen=True)
class Likely:
    """Every id of probability ``least`` or more, from one to ``at_most`` and never all; and the tail's mass.

    At an equal mean of kept entries no other choice has a smaller total variation: the entries that are left out are
    the smallest of all positions. Probabilities have 2**bits levels, as in TopK(k, bits=...).

    ``coded`` writes them with an entropy coder (coding.py; needs the extra 'compact') and tables that are kept once,
    made from the first batch: about 30 % smaller, read somewhat slower. Smaller ``least``: closer and larger.
    """

    least: float = 0.002
    at_most: int = 256
    bits: int = 6
    coded: bool = False

    def __post_init__(self) -> None:
        check_count(self, "at_most", self.at_most)
        check_bits(self, self.bits)
        if not 0 <= self.least < 1:
            raise UsageError(f"{self}: least is a probability, from 0 to below 1.")
        if self.coded:
            coding.need_constriction(f"keep={self}")

    def prepare(self, signal: Signal) -> dict[str, Tensor]:
        """The tables of the entropy coder, made from one answer; nothing without it."""
        if not self.coded:
            return {}
        rows, vocabulary = self._entries(signal, None)
        return coding.make_tables(rows, self.bits, vocabulary)

    def encode(self, signal: Signal, keys: Sequence[Key], once: Rows) -> Kept:
        rows, vocabulary = self._entries(signal, keys)
        facts: dict[str, Any] = {"vocabulary": vocabulary, "positions": list(signal.need_logits().shape[1:])}
        if self.coded:
            return Kept(lay("logits.coded", [coding.write(row, self.bits, once) for row in rows]), {"logits": facts})
        packed = [self._pack(row, vocabulary) for row in rows]
        return Kept(lay("logits.packed", packed), {"logits": facts})

    def decode(self, rows: Rows, facts: Facts, once: Rows) -> Signal:
        shape, vocabulary = facts["logits"]["positions"], facts["logits"]["vocabulary"]
        positions = int(np.prod(shape, dtype=np.int64))
        if self.coded:
            found = [coding.read(row, positions, self.bits, once) for row in split(rows, "logits.coded")]
        else:
            found = [self._unpack(row, positions, vocabulary) for row in split(rows, "logits.packed")]
        most = max((int(row.counts.max(initial=1)) for row in found), default=1)
        # Few widths, so that what is compiled for one serves again; always fewer than V, so that there is a tail.
        width = max(most, min(1 << (most - 1).bit_length(), vocabulary - 1))
        return Signal(logits=sparse_of(found, self.bits, width, shape, vocabulary))

    def _pack(self, row: Entries, vocabulary: int) -> np.ndarray:
        total = np.array([len(row.ids)], "<u4").view(np.uint8)
        return np.concatenate([total, pack_entries(row, self.bits, vocabulary)])

    def _unpack(self, packed: np.ndarray, positions: int, vocabulary: int) -> Entries:
        total = int(packed[:4].copy().view("<u4")[0])
        return unpack_entries(packed[4:], positions, total, self.bits, vocabulary)

    def _entries(self, signal: Signal, keys: Sequence[Key] | None) -> tuple[list[Entries], int]:
        """The entries of each example, and V."""
        logits = signal.need_logits(f"keep={self}")
        vocabulary = logits.vocabulary
        if isinstance(logits, Sparse):
            raise SignalError(f"keep={self} needs all logits, but the teacher gives Sparse ones. Keep TopK.")
        ids, log_probs, kept, rest = over_positions(logits, self._choose)
        if keys is not None:
            check_numbers(log_probs.cpu(), "log-probabilities", keys, impossible=True)
        rows = []
        for row in range(len(ids)):
            flat = [part[row].cpu().reshape(-1, ids.shape[-1]) for part in (ids, log_probs, kept)]
            rows.append(to_entries(flat[0], flat[1], rest[row].cpu().reshape(-1), self.bits, flat[2]))
        return rows, vocabulary

    def _choose(self, values: Tensor, _first: int) -> tuple[Tensor, ...]:
        everything = log_softmax(values)
        # One id at least is not kept, so that there is a tail wherever another position is padded.
        log_probs, ids = everything.topk(max(1, min(self.at_most, values.shape[-1] - 1)), dim=-1)
        kept = log_probs >= (math.log(self.least) if self.least else -torch.inf)
        kept[..., 0] = True
        rest = everything.scatter(-1, ids, torch.where(kept, -torch.inf, log_probs)).logsumexp(-1)
        return ids, log_probs, kept, rest

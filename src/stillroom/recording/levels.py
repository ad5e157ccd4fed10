"""Kept entries of a distribution in few bits: levels of the probability, ids, and the tail's odds.

The level of probability p is floor(2**bits (1 - p**(1/4))): equal steps of the fourth root, fine where the mass is and
wide enough for what is rare (6 bits: 6 % at p = 1, 20 % at 0.01; the last level is all below 6e-8). What is read back
is the middle of each level, scaled so that the kept entries and the tail sum to 1 exactly.

Entries of one level are a set: kept by id. Letters: N positions, K entries of one position, E entries of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillroom.recording.packing import pack, pack_sorted, unpack, unpack_sorted, width_of

ODDS_RANGE = 12.0  # the tail's log odds beyond which nothing is told apart: a mass of 6e-6
ODDS_STEP = ODDS_RANGE / 127


@dataclass(frozen=True, eq=False)
class Entries:
    """The kept entries of N positions, one position after the other; within one by level, then by id."""

    counts: np.ndarray  # [N] int64: the entries of each position
    levels: np.ndarray  # [E] int64
    ids: np.ndarray  # [E] int64
    odds: np.ndarray  # [N] uint8: log(tail / kept) in steps of 12/127 nats, 128 = even; 0 = no tail


def join(rows: Sequence[Entries]) -> Entries:
    """The entries of several examples as if their positions were those of one."""
    none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    parts = zip(none, *((row.counts, row.levels, row.ids, row.odds) for row in rows), strict=True)
    return Entries(*(np.concatenate(part) for part in parts))


def to_entries(ids: Tensor, log_probs: Tensor, rest: Tensor, bits: int, kept: Tensor | None = None) -> Entries:
    """Of ids [N, K], log_probs [N, K] and rest [N] in nats, those that are ``kept`` [N, K] bool (None: all)."""
    level = level_of(log_probs, bits)
    place = torch.arange(len(ids)).unsqueeze(1).expand_as(ids)
    chosen = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept
    rows, levels, entries = (tensor[chosen].numpy() for tensor in (place, level, ids))
    order = np.lexsort((entries, levels, rows))
    odds = rest.double() - torch.log1p(-rest.double().exp().clamp(max=1 - 1e-12))
    coded = (odds.clamp(-ODDS_RANGE, ODDS_RANGE) / ODDS_STEP).round() + 128
    return Entries(
        np.bincount(rows, minlength=len(ids)),
        levels[order],
        entries[order],
        coded.masked_fill(rest == -torch.inf, 0).to(torch.uint8).numpy(),
    )


def from_entries(entries: Entries, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ids [N, width], log_probs [N, width] and rest [N]; places that are left repeat the first id with -inf."""
    place = np.repeat(np.arange(len(entries.counts)), entries.counts)
    log_p = middles(bits)[torch.from_numpy(entries.levels)]
    # Summed entry by entry, so that no bit depends on the width or on what else is in the batch.
    mass = torch.from_numpy(np.bincount(place, log_p.exp().numpy(), len(entries.counts)))
    odds = (torch.from_numpy(entries.odds).float() - 128) * ODDS_STEP
    odds.masked_fill_(odds < -ODDS_RANGE, -torch.inf)
    scale = torch.nn.functional.logsigmoid(-odds) - mass.log().float()
    filled = torch.arange(width) < torch.from_numpy(entries.counts).unsqueeze(1)
    ids, log_probs = torch.zeros(filled.shape, dtype=torch.int64), torch.full(filled.shape, -torch.inf)
    ids[filled] = torch.from_numpy(entries.ids)
    log_probs[filled] = log_p + scale[torch.from_numpy(place)]
    return torch.where(filled, ids, ids[:, :1]), log_probs, torch.nn.functional.logsigmoid(odds)


def level_of(log_probs: Tensor, bits: int) -> Tensor:
    """The level of each log-probability, int64 from 0 to 2**bits - 1."""
    return ((1 - (log_probs.double() / 4).exp()) * 2**bits).long().clamp(0, 2**bits - 1)


def middles(bits: int) -> Tensor:
    """The log-probability of each level [2**bits], in nats."""
    return 4 * torch.log1p(-(torch.arange(2**bits) + 0.5) / 2**bits)


def pack_entries(entries: Entries, bits: int, vocabulary: int) -> np.ndarray:
    """[bytes] uint8: the bitmap of 2**bits n + level, where n is the position's number; the ids; the odds."""
    positions = len(entries.counts)
    places = np.repeat(np.arange(positions), entries.counts) * 2**bits + entries.levels
    bitmap = pack_sorted(places, positions * 2**bits)
    return np.concatenate([bitmap, pack(entries.ids, width_of(vocabulary)), entries.odds])


def unpack_entries(packed: np.ndarray, positions: int, total: int, bits: int, vocabulary: int) -> Entries:
    """The inverse of ``pack_entries`` for ``total`` entries at so many positions."""
    bitmap = -(-(positions * 2**bits + total) // 8)
    numbers, levels = np.divmod(unpack_sorted(packed[:bitmap], total), 2**bits)
    ids = unpack(packed[bitmap : len(packed) - positions], total, width_of(vocabulary))
    return Entries(np.bincount(numbers, minlength=positions), levels, ids, packed[len(packed) - positions :])

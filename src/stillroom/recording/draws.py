"""Random draws in few bits: each drawn id once, and how often it came. N positions, n draws, E different ids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stillroom.recording.levels import level_of, middles
from stillroom.recording.packing import pack, unpack, width_of


def pack_draws(ids: Tensor, log_probs: Tensor, bits: int, vocabulary: int) -> np.ndarray:
    """[N, n] draws -> bytes: a bit for each draw, 1 where its id is new; the new ids; with ``bits`` their levels.

    The draws of a position are sorted by id first: their order says nothing.
    """
    ids, order = ids.sort(-1)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    parts = [np.packbits(new.numpy(), bitorder="little"), pack(ids[new].numpy(), width_of(vocabulary))]
    if bits:
        parts.append(pack(level_of(log_probs.gather(-1, order)[new], bits).numpy(), bits))
    return np.concatenate(parts)


def unpack_draws(packed: np.ndarray, positions: int, n: int, bits: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The ids [N, n], sorted, and their log_probs [N, n]; without ``bits`` the log of how often each was drawn of n."""
    flags = -(-positions * n // 8)
    new = np.unpackbits(packed[:flags], count=positions * n, bitorder="little").astype(bool)
    entry = np.cumsum(new) - 1  # [N n]: which of the different ids each draw is
    count, width = int(new.sum()), width_of(vocabulary)
    end = flags + -(-count * width // 8)
    ids = unpack(packed[flags:end], count, width)
    if bits:
        log_probs = middles(bits)[torch.from_numpy(unpack(packed[end:], count, bits))]
    else:
        log_probs = (torch.from_numpy(np.bincount(entry, minlength=count)).float() / n).log()
    return torch.from_numpy(ids[entry]).view(-1, n), log_probs[torch.from_numpy(entry)].view(-1, n)

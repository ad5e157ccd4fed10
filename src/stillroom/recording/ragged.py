"""Rows of different lengths: the bytes of all rows one after the other, and where each row begins.

An array NAME [bytes] uint8 and NAME.offsets [rows + 1] int64; row n is NAME[offsets[n] : offsets[n + 1]].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

OFFSETS = ".offsets"


def lay(name: str, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """The two arrays of rows of bytes."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return {
        name: torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *rows])),
        name + OFFSETS: torch.from_numpy(offsets),
    }


def split(arrays: Mapping[str, Tensor], name: str) -> list[np.ndarray]:
    """The inverse of ``lay``."""
    offsets = arrays[name + OFFSETS].tolist()
    values = arrays[name].numpy()
    return [values[start:stop] for start, stop in pairwise(offsets)]


def append(pieces: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The arrays of several batches as those of one: rows follow rows, offsets go on from the last one's end."""
    joined = {}
    for name, parts in pieces.items():
        if name.endswith(OFFSETS):
            lengths = torch.cat([part.diff() for part in parts])
            joined[name] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        else:
            joined[name] = torch.cat(list(parts))
    return joined

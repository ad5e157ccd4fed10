"""The entropy coder of Likely: kept entries in about the bits of their information. All that knows constriction.

Of each example, one stack of 32-bit words (asymmetric numeral systems, Duda 2013), read from its end:
1. level by level, how many entries each position has there, given how many it has just above and the mass so far;
2. the tail's odds, given the mass of all levels;
3. the ids, by how often each is expected.

Entries of one level are a set, and a set has log2(c!) bits less to say than a list. They are won back ("bits back",
Townsend et al. 2019; for sets Severo et al. 2021): bits that are already on the stack choose the order in which the ids
of a set are written, and the reader, who knows the set, puts those bits back.

What an example talks about it repeats: so its positions are in BLOCKS blocks, the last of which is read first, and what
was read counts beside the table. On SmolLM2 (least=0.002) bits back save 10 % and the repetitions 5 %.

The tables are kept once as float16, and numbers are only looked up and added: every machine reads the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.errors import MissingExtraError
from stillroom.recording.levels import Entries
from stillroom.recording.rows import Rows

RECENT = np.array([1, 3])  # where 2 c(l-1) + c(l-2) begins a new context
MASSES = 8  # contexts of the mass so far, in equal steps
MANY = 24  # this many on one level or more: how many more follows, in EXTRA
EXTRA = 1 << 20
BLOCKS = 16
TABLE = 1600  # how many entries of the example itself count as much as the table
UNSEEN = 0.05  # how often an id counts as seen that was not
RUN = 16  # a larger set is written as several


def need_constriction(who: str) -> Any:
    """The library. Raises MissingExtraError, naming the extra."""
    try:
        return importlib.import_module("constriction").stream
    except ImportError as error:
        raise MissingExtraError(
            f"{who} needs the library constriction: pip install 'stillroom[compact]', or use coded=False."
        ) from error


def make_tables(rows: Sequence[Entries], bits: int, vocabulary: int) -> dict[str, Tensor]:
    """What is expected of entries like these: probabilities of ids, counts and odds; nothing is impossible."""
    ids = np.bincount(np.concatenate([row.ids for row in rows]), minlength=vocabulary) + UNSEEN
    counts = np.concatenate([_counts(row, bits) for row in rows])
    masses = _masses(counts, bits)
    table = np.zeros((2**bits, MASSES * (len(RECENT) + 1), MANY + 1))
    rare = 0.01 * 0.5 ** np.arange(MANY + 1)
    for level, found in enumerate(counts.T.clip(max=MANY)):
        table[level] += np.bincount(found, minlength=MANY + 1) / len(found) + rare
        np.add.at(table[level], (_context(counts, masses, level), found), 1)
    odds = np.full((MASSES, 256), 0.01)
    np.add.at(odds, (masses[:, -1], np.concatenate([row.odds for row in rows])), 1)
    made = {"ids": ids, "counts": table, "odds": odds + 0.1 * odds.mean(0)}
    return {
        f"code.{name}": torch.from_numpy((TABLE * array / array.sum(-1, keepdims=True)).astype(np.float16))
        for name, array in made.items()
    }


def write(row: Entries, bits: int, once: Rows) -> np.ndarray:
    """The entries of one example -> bytes."""
    stream, (ids, tables, odds) = need_constriction("writing this recording"), _tables(once)
    family, uniform, coder = stream.model.Categorical(perfect=False), stream.model.Uniform(), stream.stack.AnsCoder()
    counts = _counts(row, bits)
    masses = _masses(counts, bits)
    ends = np.cumsum([0, *row.counts])
    blocks, expected = _blocks(len(counts)), _Expected(stream, ids)
    models = []
    for start, stop in reversed(blocks):
        models.append(expected.model())
        expected.saw(row.ids[ends[start] : ends[stop]])
    for start, stop in blocks:
        sets = _Sets(counts[start:stop])
        choices = coder.decode(uniform, sets.choices) if len(sets.choices) else sets.choices
        written = sets.ordered(row.ids[ends[start] : ends[stop]], choices)
        coder.encode_reverse(written.astype(np.int32), models.pop())
    coder.encode_reverse(row.odds.astype(np.int32), family, odds[masses[:, -1]])
    for level in reversed(range(2**bits)):
        found = counts[:, level].astype(np.int32)
        if (many := found >= MANY).any():
            coder.encode_reverse(found[many] - MANY, stream.model.Uniform(EXTRA))
        coder.encode_reverse(found.clip(max=MANY), family, tables[level][_context(counts, masses, level)])
    return coder.get_compressed().astype("<u4").view(np.uint8)


def read(packed: np.ndarray, positions: int, bits: int, once: Rows) -> Entries:
    """The inverse of ``write``."""
    stream, (ids, tables, odds) = need_constriction("reading this recording"), _tables(once)
    family, uniform = stream.model.Categorical(perfect=False), stream.model.Uniform()
    coder = stream.stack.AnsCoder(packed.copy().view("<u4").astype(np.uint32))
    counts, masses = np.zeros((positions, 2**bits), np.int64), np.zeros((positions, 2**bits), np.int64)
    mass, steps = np.zeros(positions, np.int64), _steps(bits)
    for level in range(2**bits):
        found = coder.decode(family, tables[level][_context(counts, masses, level)]).astype(np.int64)
        if (many := found == MANY).any():
            found[many] += coder.decode(stream.model.Uniform(EXTRA), int(many.sum()))
        counts[:, level] = found
        mass += found * steps[level]
        masses[:, level] = _bucket(mass)
    tails = coder.decode(family, odds[masses[:, -1]]).astype(np.uint8)
    blocks, expected = [], _Expected(stream, ids)
    for start, stop in reversed(_blocks(positions)):
        sets = _Sets(counts[start:stop])
        block, choices = sets.sorted(coder.decode(expected.model(), int(counts[start:stop].sum())).astype(np.int64))
        expected.saw(block)
        if len(choices):
            coder.encode_reverse(choices, uniform, sets.choices)
        blocks.append(block)
    levels = np.repeat(np.tile(np.arange(2**bits), positions), counts.ravel())
    return Entries(counts.sum(1), levels, np.concatenate([np.empty(0, np.int64), *blocks[::-1]]), tails)


class _Expected:
    """How often each id is expected: the table, and what was read so far."""

    def __init__(self, stream: Any, table: np.ndarray) -> None:
        self._make, self._table = stream.model.Categorical, table.copy()

    def model(self) -> Any:
        return self._make(self._table, perfect=False)

    def saw(self, ids: np.ndarray) -> None:
        np.add.at(self._table, ids, 1.0)


class _Sets:
    """The sets of a block of positions, each at most RUN long, one in each row of a table."""

    def __init__(self, counts: np.ndarray) -> None:
        sizes = counts.ravel()[counts.ravel() > 0]
        runs = -(-sizes // RUN)
        first = np.repeat(np.cumsum(runs) - runs, runs)
        self.sizes = np.minimum(RUN, np.repeat(sizes, runs) - RUN * (np.arange(runs.sum()) - first))
        place = np.arange(self.sizes.max(initial=1))
        self.filled = place < self.sizes[:, None]
        self.chosen = place < self.sizes[:, None] - 1  # the last of a set is no choice
        self.choices = (self.sizes[:, None] - place)[self.chosen].astype(np.int32)  # among how many

    def ordered(self, ids: np.ndarray, choices: np.ndarray) -> np.ndarray:
        """Ids [E], sorted within each set, in the order that the choices say: always the n-th smallest that is left."""
        left, nth = self._table(ids), np.zeros(self.filled.shape, np.int64)
        nth[self.chosen] = choices
        taken, rows, place = np.empty_like(left), np.arange(len(left)), np.arange(left.shape[1])
        for at in range(left.shape[1]):
            taken[:, at] = left[rows, nth[:, at]]
            later = np.concatenate([left[:, 1:], left[:, :1]], 1)
            left = np.where(place >= nth[:, at : at + 1], later, left)
        return taken[self.filled]

    def sorted(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of ``ordered``: the sorted ids, and the choices."""
        table = self._table(ids)
        place = np.arange(table.shape[1])
        after = place[None, None, :] > place[None, :, None]
        nth = ((table[:, None, :] < table[:, :, None]) & after).sum(-1)
        return np.sort(table, 1)[self.filled], nth[self.chosen].astype(np.int32)

    def _table(self, ids: np.ndarray) -> np.ndarray:
        table = np.full(self.filled.shape, np.iinfo(np.int64).max)
        table[self.filled] = ids
        return table


def _tables(once: Rows) -> Iterator[np.ndarray]:
    # In float64, as constriction's sums in float32 may leave the last entry of a table no room at all.
    return (once[f"code.{name}"].double().numpy() for name in ("ids", "counts", "odds"))


def _blocks(positions: int) -> list[tuple[int, int]]:
    ends = [positions * number // BLOCKS for number in range(BLOCKS + 1)]
    return [(start, stop) for start, stop in pairwise(ends) if stop > start]


def _counts(row: Entries, bits: int) -> np.ndarray:
    """How many entries each position has on each level, [N, 2**bits]."""
    places = np.repeat(np.arange(len(row.counts)), row.counts) * 2**bits + row.levels
    return np.bincount(places, minlength=len(row.counts) * 2**bits).reshape(-1, 2**bits)


def _steps(bits: int) -> np.ndarray:
    """The probability of each level in units of 2**-20, [2**bits]: whole numbers, the same on every machine."""
    roots = 2 ** (bits + 1) - 1 - 2 * np.arange(2**bits)  # the middle's fourth root, in units of 2**-(bits + 1)
    return roots**4 << 20 >> 4 * (bits + 1)


def _masses(counts: np.ndarray, bits: int) -> np.ndarray:
    """The context of the mass up to each level, [N, 2**bits]."""
    return _bucket(np.cumsum(counts * _steps(bits), 1))


def _bucket(mass: np.ndarray) -> np.ndarray:
    return np.minimum(mass * MASSES >> 20, MASSES - 1)


def _context(counts: np.ndarray, masses: np.ndarray, level: int) -> np.ndarray:
    """What is known of each position before this level is read, [N] int64."""
    if level == 0:
        return np.zeros(len(counts), np.int64)
    recent = 2 * counts[:, level - 1] + (counts[:, level - 2] if level > 1 else 0)
    return masses[:, level - 1] * (len(RECENT) + 1) + np.searchsorted(RECENT, recent, side="right")

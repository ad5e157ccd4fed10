"""Whole numbers of any width in bits, end to end; and sorted ones as a bitmap. Knows no codec.

Bit 0 of a byte is its lowest; the bits of a number too run from the lowest on. Nothing depends on the machine.
"""

from __future__ import annotations

import numpy as np


def width_of(count: int) -> int:
    """The bits that hold every whole number from 0 to ``count`` - 1; at least 1."""
    return max(1, (count - 1).bit_length())


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """[N] whole numbers below 2**width, width 1 to 32 -> [ceil(N width / 8)] uint8."""
    if width in (8, 16, 32):
        return values.astype(f"<u{width // 8}").view(np.uint8)
    bits = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(bits, axis=1, bitorder="little")[:, :width], bitorder="little")


def unpack(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """The inverse of ``pack``: the first ``count`` numbers, [count] int64."""
    if width in (8, 16, 32):
        return packed[: count * width // 8].view(f"<u{width // 8}").astype(np.int64)
    # A number lies within 5 bytes, so within the 8 that start with its first: one unaligned read for each number.
    padded = np.concatenate([packed, np.zeros(8, np.uint8)])
    windows = np.ndarray(len(packed) + 1, "<u8", padded, strides=(1,))
    starts = np.arange(count, dtype=np.uint64) * np.uint64(width)
    shifted = windows[(starts >> np.uint64(3)).astype(np.int64)] >> (starts & np.uint64(7))
    return (shifted & np.uint64((1 << width) - 1)).astype(np.int64)


def pack_sorted(values: np.ndarray, below: int) -> np.ndarray:
    """[N] numbers from 0 to ``below`` - 1, never falling -> [ceil((N + below) / 8)] uint8.

    For each number in turn its occurrences as ones, then a zero: the upper half of Elias and Fano's code. It takes
    1 + below / N bits for each, without tables.
    """
    bits = np.zeros(len(values) + below, np.uint8)
    bits[values + np.arange(len(values))] = 1
    return np.packbits(bits, bitorder="little")


def unpack_sorted(packed: np.ndarray, count: int) -> np.ndarray:
    """The inverse of ``pack_sorted``: the first ``count`` numbers, [count] int64."""
    ones = np.flatnonzero(np.unpackbits(packed, bitorder="little"))[:count]
    return ones - np.arange(len(ones))

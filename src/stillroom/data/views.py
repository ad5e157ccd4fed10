"""Seeded views: an augmentation that is replayed exactly from (example id, view seed), on any machine.

A recording of augmented inputs stays valid only if the student later sees the same pixels, bit for bit. So nothing
here uses a generator with state: every number is a hash of (id, seed, how many were drawn before).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from stillroom.digests import key_hash
from stillroom.errors import DataError, UsageError, nearest
from stillroom.types import Column

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LEVELS = 4096


class Draws:
    """``draws(n)`` gives float32 [B, n] in [0, 1): row i depends on (id i, view i) and on how many came before.

    Draw the same number for every batch, or draw a number that depends on the batch last: then a view is the same
    whatever rows share its batch.
    """

    def __init__(self, seeds: np.ndarray):
        self._seeds = seeds  # uint64 [B]
        self._drawn = 0

    @classmethod
    def of(cls, ids: Sequence[str], views: Sequence[int]) -> Draws:
        """The draws of these examples under these view seeds."""
        keys = [key_hash(name, int(view)) for name, view in zip(ids, views, strict=True)]
        return cls(np.array(keys, dtype=np.uint64))

    def __call__(self, count: int) -> Tensor:
        steps = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64)
        self._drawn += count
        bits = _splitmix(self._seeds[:, None] + steps[None, :] * GOLDEN)
        # 24 bits fill a float32's significand exactly: no rounding, and never 1.0
        return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))

    def __len__(self) -> int:
        return len(self._seeds)

    def stream(self, number: int) -> Draws:
        """Fresh draws, independent of these and of other numbers'."""
        return Draws(_splitmix(self._seeds ^ _splitmix(np.array([number + 1], dtype=np.uint64))))


def _splitmix(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014); arithmetic is modulo 2^64 by uint64 arrays."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(frozen=True)
class Chain:
    """Several augmentations in order, each with its own stream of draws."""

    steps: tuple[Callable[[Mapping[str, Column], Draws], Mapping[str, Column]], ...]

    def __call__(self, inputs: Mapping[str, Column], draws: Draws) -> Mapping[str, Column]:
        for number, step in enumerate(self.steps):
            inputs = {**inputs, **step(inputs, draws.stream(number))}
        return inputs


@dataclass(frozen=True)
class Shift:
    """Images [B, ..., H, W] moved by up to ``pixels`` in both directions; ``fill`` comes in at the border."""

    pixels: int = 2
    column: str = "x"
    fill: float = 0.0

    def __call__(self, inputs: Mapping[str, Column], draws: Draws) -> Mapping[str, Column]:
        images = _tensor(inputs, self.column, least_dims=3)
        height, width = images.shape[-2:]
        moves = (draws(2) * (2 * self.pixels + 1)).long()  # [B, 2] in 0 .. 2 pixels
        padded = torch.nn.functional.pad(images, (self.pixels,) * 4, value=self.fill)
        rows = moves[:, :1] + torch.arange(height)  # [B, H]
        columns = moves[:, 1:] + torch.arange(width)  # [B, W]
        flat = padded.reshape(len(images), -1, *padded.shape[-2:])  # [B, C, H + 2p, W + 2p]
        where = torch.arange(len(images))[:, None, None]
        # advanced indices around a slice put C last: [B, H, W, C]
        moved = flat[where, :, rows[:, :, None], columns[:, None, :]]
        return {self.column: moved.permute(0, 3, 1, 2).reshape(images.shape)}


@dataclass(frozen=True)
class Flip:
    """Images [B, ..., W] mirrored left to right with this probability."""

    probability: float = 0.5
    column: str = "x"

    def __call__(self, inputs: Mapping[str, Column], draws: Draws) -> Mapping[str, Column]:
        images = _tensor(inputs, self.column, least_dims=2)
        chosen = (draws(1) < self.probability).reshape(-1, *([1] * (images.dim() - 1)))
        return {self.column: torch.where(chosen, images.flip(-1), images)}


@dataclass(frozen=True)
class Noise:
    """A tensor column plus normal noise of this standard deviation.

    The noise takes one of 4096 quantiles of the normal distribution (so at most 3.7 deviations): a table, because
    logarithms and cosines differ in the last bit between machines and would make a replayed view another input.
    """

    std: float = 0.1
    column: str = "x"

    def __call__(self, inputs: Mapping[str, Column], draws: Draws) -> Mapping[str, Column]:
        values = _tensor(inputs, self.column, least_dims=1)
        if not values.is_floating_point():
            raise DataError(f"column {self.column!r} is {values.dtype}; noise is added to floats only.")
        size = values[0].numel() if len(values) else 0
        normal = _quantiles()[(draws(size) * LEVELS).long()].reshape(values.shape)
        return {self.column: values + self.std * normal.to(values.dtype)}


@dataclass(frozen=True)
class WordDropout:
    """Texts whose words (split at white space) are each left out with this probability; one word always stays."""

    probability: float = 0.1
    column: str = "text"

    def __call__(self, inputs: Mapping[str, Column], draws: Draws) -> Mapping[str, Column]:
        texts = inputs.get(self.column)
        if texts is None or isinstance(texts, Tensor):
            raise DataError(f"there is no text column {self.column!r}{nearest(self.column, inputs)}")
        first = (draws(1)[:, 0]).tolist()
        words = [text.split() for text in texts]
        kept = (draws(max((len(row) for row in words), default=0)) >= self.probability).tolist()
        return {self.column: tuple(map(_without, words, kept, first))}


def _without(words: list[str], kept: list[bool], spare: float) -> str:
    chosen = [word for word, keep in zip(words, kept, strict=False) if keep]
    return " ".join(chosen or words[int(spare * len(words)) :][:1])


@cache
def _quantiles() -> Tensor:
    normal = NormalDist()
    values = np.array([round(normal.inv_cdf((i + 0.5) / LEVELS), 6) for i in range(LEVELS)])
    return torch.from_numpy((values / values.std()).round(6).astype(np.float32))


def _tensor(inputs: Mapping[str, Column], name: str, least_dims: int) -> Tensor:
    column = inputs.get(name)
    if not isinstance(column, Tensor):
        raise DataError(f"there is no tensor column {name!r}{nearest(name, inputs)}")
    if column.dim() < least_dims:
        raise UsageError(
            f"column {name!r} has shape {list(column.shape)}; this augmentation needs {least_dims} or more."
        )
    return column

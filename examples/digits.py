"""Handwritten digits (scikit-learn's 1,797 images of 8x8 pixels), and a convolutional teacher for them."""

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

import stillroom as sr


def digits(split: str) -> sr.Table:
    """The first 1,297 images are for training, the last 500 for the test (other writers)."""
    bunch: Any = load_digits()
    rows = slice(0, 1297) if split == "train" else slice(1297, None)
    return sr.Table(
        columns={"x": torch.tensor(bunch.images[rows], dtype=torch.float32) / 16},
        ids=tuple(f"digit-{number:04d}" for number in range(1797)[rows]),
        labels=torch.tensor(bunch.target[rows]),
        classes=tuple("0123456789"),
        name=f"digits, {split}",
        licence="CC-BY-4.0",
        source="scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits)",
    )


def teacher(
    examples: sr.Table, workspace: Path | None = None, steps: int = 600, seed: int = 0, progress: bool = True
) -> sr.Model:
    """A small convolutional network trained on the labelled rows, in shifted views; ``seed``: of all that is drawn."""
    from stillroom.data.views import Shift

    start = sr.Student.make(
        "stillroom.students.architectures:small_cnn",
        {"channels": 1, "classes": 10, "width": 32, "size": 8, "dropout": 0.4},
        classes=examples.classes,
        seed=seed,
        name="digits teacher",
    )
    plan = sr.Plan(seed=seed, steps=steps, batch_size=50, learning_rate=3e-3)
    labelled = examples.labelled().with_augment(Shift(1))
    trained = sr.fit(start, None, labelled, sr.HardLabels(), plan=plan, folder=workspace, progress=progress)
    return sr.from_network(
        trained.net, classes=trained.classes, name="digits teacher", licence="Apache-2.0", source="examples/digits.py"
    )

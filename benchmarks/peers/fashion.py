"""What both sides of recorded_epoch.py share: the images, the networks, the usual live-teacher loop. No stillroom here.

The peer's process imports this file too, so that both train the same student on the same teacher and images.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
ROWS = 60_000
CLASSES = 10
BATCH = 128
TEMPERATURE = 4.0
LABELS_WEIGHT = 0.1
LEARNING_RATE = 1e-3
Layout = Literal["channels_last", "default"]  # of every network on every side
FORMATS = {"channels_last": torch.channels_last, "default": torch.contiguous_format}


def read_images(folder: Path = DEBIAN, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 [rows, 28, 28], labels uint8 [rows] and what they are; drawn ones where the package is missing."""
    images, labels = folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte.gz"
    if images.is_file() and labels.is_file():
        pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
        return pixels[:rows].copy(), classes[:rows].copy(), "Fashion-MNIST, training split"
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    return pixels, draw.integers(0, CLASSES, rows, dtype=np.uint8), "SYNTHETIC noise of Fashion-MNIST's shape"


class PilImages(Dataset):
    """Image by image as torchvision's data sets of this kind do: array -> PIL image -> float tensor [1, 28, 28]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True))
        return pixels.unsqueeze(0).to(torch.float32).div(255), int(self.labels[index])


def student_net(layout: Layout) -> nn.Module:
    """Two convolutions, two linear layers, 105,866 parameters: [B, 1, 28, 28] -> [B, 10]."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip
    return net.to(memory_format=FORMATS[layout])


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


TEACHERS = {  # name: widths of the stages, blocks in each
    "resnet20": ((16, 32, 64), 3),
    "resnet56": ((16, 32, 64), 9),
    "wrn_40_2": ((32, 64, 128), 6),
    "resnet18": ((64, 128, 256, 512), 2),
}


def teacher_net(name: str, layout: Layout) -> nn.Module:
    """Residual networks for small images (3x3 stem, one input channel), in evaluation mode and untrained.

    resnet20, 56: He et al. 2016, section 4.2; resnet18: its stages of the ImageNet network; wrn_40_2: the depth and
    widths of Zagoruyko and Komodakis 2016, with the order of operations within a block that the others have.
    """
    torch.manual_seed(1)
    widths, blocks = TEACHERS[name]
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Residual(inputs, width, 2 if stage and block == 0 else 1))
            inputs = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))
    return net.eval().requires_grad_(False).to(memory_format=FORMATS[layout])


def soft_and_hard(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The objective of every side: 0.9 T^2 KL(teacher || student) + 0.1 cross-entropy."""
    soft = nn.functional.kl_div(
        (student / TEMPERATURE).log_softmax(1), (teacher / TEMPERATURE).softmax(1), reduction="batchmean"
    )
    return (1 - LABELS_WEIGHT) * TEMPERATURE**2 * soft + LABELS_WEIGHT * nn.functional.cross_entropy(student, labels)


def usual_loop(images: PilImages, teacher: nn.Module, layout: Layout) -> Iterator[int]:
    """The loop that most people write: load, ask the teacher, train. Gives the images of each step that is done."""
    student = student_net(layout).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    loader = DataLoader(images, batch_size=BATCH, sampler=RandomSampler(images))
    for pixels, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        with torch.no_grad():
            said = teacher(pixels)
        loss = soft_and_hard(student(pixels), said, labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        yield len(labels)


def student_only(pixels: Tensor, labels: Tensor, layout: Layout) -> Iterator[int]:
    """The least that training can cost: tensors and the teacher's answers in memory, plain torch, no checks."""
    student = student_net(layout).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    said = torch.randn(len(pixels), CLASSES)
    while True:
        for rows in torch.randperm(len(pixels)).split(BATCH):
            loss = soft_and_hard(student(pixels[rows]), said[rows], labels[rows])
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            yield len(rows)

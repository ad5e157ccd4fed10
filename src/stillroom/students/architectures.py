"""Small students: ordinary networks from plain arguments, so that a run's folder can rebuild them.

No batch normalisation: what a student learns must not depend on how a batch was cut into pieces.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.errors import UsageError

Pooling = Literal["mean", "sqrt", "mean+max"]


def mlp(
    inputs: int, outputs: int, hidden: Sequence[int] = (64,), dropout: float = 0.0, scale: float = 1.0
) -> nn.Module:
    """A multilayer perceptron with ReLU: [B, ...] with ``inputs`` numbers per example -> [B, ``outputs``].

    ``scale`` multiplies every input first. Networks learn fastest from numbers of about 1, so for positions in metres
    that move by centimetres give 20 to 50; the constant is a part of the network, and of what ships.
    Raises UsageError for a size below 1, or a scale that is not above 0 and finite.
    """
    _positive(inputs=inputs, outputs=outputs, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    if not (scale > 0 and math.isfinite(scale)):
        raise UsageError(f"scale is {scale}; it multiplies the inputs, so it must be above 0 and finite.")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    if scale != 1.0:
        layers["scale"] = _Times(scale)
    width = inputs
    for number, size in enumerate(hidden, 1):
        layers[f"hidden{number}"] = nn.Linear(width, size)
        layers[f"relu{number}"] = nn.ReLU()
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        width = size
    layers["output"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)


class _Times(nn.Module):
    """x -> ``factor`` x."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


def small_cnn(
    channels: int, classes: int, width: int = 16, size: int | Sequence[int] = 28, dropout: float = 0.0
) -> nn.Module:
    """Two 3x3 convolutions, each halved by pooling, and two linear layers: [B, channels, H, W] -> [B, classes].

    ``size`` is H = W, or (H, W), of at least 4. [B, H, W] is taken as one channel.
    """
    height, breadth = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    _positive(channels=channels, classes=classes, width=width)
    if min(height, breadth) < 4:
        raise UsageError(f"size is {size}; images are halved twice, so give at least 4 pixels.")
    return nn.Sequential(
        OrderedDict(
            shape=_WithChannels(channels),
            conv1=nn.Conv2d(channels, width, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(width, 2 * width, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(2 * width * (height // 4) * (breadth // 4), 4 * width),
            relu3=nn.ReLU(),
            dropout=nn.Dropout(dropout),
            output=nn.Linear(4 * width, classes),
        )
    )


class _WithChannels(nn.Module):
    """[B, H, W] -> [B, 1, H, W]; images that have channels pass."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return images.unsqueeze(1) if self.channels == 1 and images.dim() == 3 else images


def bag_of_words(
    vocabulary: int,
    classes: int,
    width: int = 32,
    hidden: int = 64,
    dropout: float = 0.0,
    pooling: Pooling = "mean",
) -> nn.Module:
    """Embedding, pooling over the words, a small perceptron: int64 [B, L], 0 = padding -> [B, classes].

    ``vocabulary`` is ``Words.size``: how many numbers there are. ``hidden`` = 0 leaves out the hidden layer.
    ``pooling``: "mean", "sqrt" (sum / sqrt(words): a longer text is surer), or "mean+max" (twice the features, notices
    single words in long texts). Embeddings start small, so that words that training never saw say next to nothing.
    """
    return BagOfWords(vocabulary, classes, width, hidden, dropout, pooling)


class BagOfWords(nn.Module):
    """See ``bag_of_words``. Few kernels: at batch 1 the cost is calling them."""

    def __init__(self, vocabulary: int, classes: int, width: int, hidden: int, dropout: float, pooling: Pooling):
        super().__init__()
        _positive(vocabulary=vocabulary, classes=classes, width=width)
        if pooling not in ("mean", "sqrt", "mean+max"):
            raise UsageError(f"pooling is {pooling!r}; choose 'mean', 'sqrt' or 'mean+max'.")
        self.pooling = pooling
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        with torch.no_grad():
            self.embedding.weight.mul_(0.05)
        features = width * (2 if pooling == "mean+max" else 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        if hidden:
            layers["hidden"] = nn.Linear(features, hidden)
            layers["relu"] = nn.ReLU()
        layers["output"] = nn.Linear(hidden or features, classes)
        self.head = nn.Sequential(layers)

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.embedding(words)  # [B, L, D]; the padding row is zero, so a plain sum leaves padding out
        real = words.ne(0)
        count = real.sum(1, keepdim=True).clamp(min=1)
        pooled = embedded.sum(1) / (count.sqrt() if self.pooling == "sqrt" else count)
        if self.pooling == "mean+max":
            lowest = embedded.masked_fill(real.logical_not().unsqueeze(-1), -1e4).amax(1)
            # a text without words has no largest embedding: zero, like its mean
            pooled = torch.cat([pooled, lowest * real.any(1, keepdim=True)], dim=1)
        return self.head(pooled)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} is {size}; it must be at least 1.")

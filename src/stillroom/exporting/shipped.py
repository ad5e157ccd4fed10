"""The network as it is shipped: tensors in, one tensor out, built of what every target knows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stillroom.exporting.artifact import output_of
from stillroom.network import Answers
from stillroom.types import Signal


class Shipped(nn.Module):
    """The network with one tensor as its output, and bags of embeddings as a lookup and a mean.

    PyTorch exports nn.EmbeddingBag as a loop over examples, which is slow and cannot be int8.
    """

    def __init__(self, net: nn.Module, answers: Answers):
        super().__init__()
        self.net = net
        self.answers: Answers = answers
        for name, module in list(net.named_modules()):
            if isinstance(module, nn.EmbeddingBag) and module.mode in ("mean", "sum") and module.max_norm is None:
                if name:
                    net.set_submodule(name, _Bag(module))
                else:
                    self.net = _Bag(module)

    def forward(self, *tensors: Tensor) -> Tensor:
        output = self.net(*tensors)
        if isinstance(output, Signal):
            return output_of(output, self.answers)
        return output if isinstance(output, Tensor) else output.logits


class _Bag(nn.Module):
    """nn.EmbeddingBag over ids [B, T], modes mean and sum; any other call goes to the bag itself."""

    def __init__(self, bag: nn.EmbeddingBag):
        super().__init__()
        self.bag = bag

    def forward(self, ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        if ids.dim() != 2 or rest or named:
            return self.bag(ids, *rest, **named)
        found = nn.functional.embedding(ids, self.bag.weight)
        if self.bag.padding_idx is None:
            return found.sum(1) if self.bag.mode == "sum" else found.mean(1)
        counts = (ids != self.bag.padding_idx).unsqueeze(-1).to(found.dtype)
        total = (found * counts).sum(1)
        return total if self.bag.mode == "sum" else total / counts.sum(1).clamp(min=1)

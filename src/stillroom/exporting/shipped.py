"""The network as it is shipped: tensors in, one tensor out, built of what every target knows."""

from __future__ import annotations

from typing import Any

import torch
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


class NextToken(nn.Module):
    """A causal language model with its attention mask made of the positions: tokens, positions [B, T] to logits.

    The mask is explicit, [B, 1, T, T]: transformers' own finds packed documents by operations that targets do not know.
    No keys and values are kept between calls, so each call reads its whole rows.
    """

    def __init__(self, net: Any):
        super().__init__()
        self.net = net
        layers = getattr(net.config, "layer_types", None) or ("full_attention",)
        self.kinds = tuple(dict.fromkeys(layers))
        self.window = int(getattr(net.config, "sliding_window", None) or 0)

    def forward(self, *tensors: Tensor) -> Tensor:
        tokens, positions = tensors
        documents = (positions == 0).to(torch.int64).cumsum(1)
        same = documents.unsqueeze(2) == documents.unsqueeze(1)  # [B, T (asks), T (is asked)]
        back = positions.unsqueeze(2) - positions.unsqueeze(1)
        seen = same & (back >= 0)
        masks = {"full_attention": self._mask(seen)}
        if "sliding_attention" in self.kinds:
            masks["sliding_attention"] = self._mask(seen & (back < self.window))
        # a network of one kind of layer takes the mask itself
        mask = masks[self.kinds[0]] if len(self.kinds) == 1 else masks
        return self.net(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits

    def _mask(self, seen: Tensor) -> Tensor:
        """0 where a position may look, the least number elsewhere: float32 [B, 1, T, T]."""
        none = torch.finfo(torch.float32).min
        return torch.where(seen, 0.0, none).unsqueeze(1)

"""The products of one chunk of positions with a head: its logits, and the gradients to hidden states and weight.

n positions of a chunk, V ids, D features, K of the V ids. Nothing here holds a second [V, D] of anything but the one
low-precision copy of a head. Knows no row function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stillroom.divergences.row_steps import wide
from stillroom.types import Projected

_BLOCK = 2**22  # numbers of a [V, D] that are held at once beside the head and its gradient
_IDS = 1024  # of the head's rows at a time on a CPU: their logits stay in its cache while they are summed over D
_copies: Any = WeakTensorKeyDictionary()  # head -> its copy in a lower precision


def dtype_of(head: Projected) -> torch.dtype:
    """What its matmul runs in: as torch.nn.functional.linear would, autocast included."""
    dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
    device = head.hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head without gradient in another precision. The memory of a lower one is kept, and written at every call.

    Whether the head has changed is not known: a fused optimiser leaves no mark, nor does a write through
    ``weight.data``. Writing costs a small part of one product with it; the copy lives as long as the head.
    """
    if dtype.itemsize >= weight.dtype.itemsize or weight.is_inference():
        return weight.detach().to(dtype)
    copy = _copies.get(weight)
    if copy is None or copy.dtype != dtype or copy.shape != weight.shape or copy.device != weight.device:
        _copies[weight] = copy = weight.detach().to(dtype)
    else:
        copy.copy_(weight.detach())  # fresh memory would cost more time than the conversion
    return copy


class LogitsOf:
    """hidden [n, D] @ weight.T + bias, into one buffer [n, V] for all chunks: fresh pages would cost time on each."""

    def __init__(self, weight: Tensor, bias: Tensor | None, size: int) -> None:
        self.weight, self.bias = weight, bias
        self.buffer = weight.new_empty(size, len(weight))
        self.block = _IDS if weight.device.type == "cpu" and weight.dtype == torch.float32 else max(1, len(weight))

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.buffer[: len(hidden)]
        for start in range(0, len(self.weight), self.block):
            part = slice(start, start + self.block)
            if self.bias is None:
                torch.mm(hidden, self.weight[part].t(), out=logits[:, part])
            else:
                torch.addmm(self.bias[part], hidden, self.weight[part].t(), out=logits[:, part])
        return logits


def sample_columns(gradient: Tensor, threshold: float) -> tuple[Tensor, Tensor | None]:
    """An unbiased estimate of the gradient [n, V] that is 0 but in the columns of some ids: those [n, K], and ids [K].

    A column is kept with probability min(1, its largest |gradient| / threshold), and divided by that. Ids that matter,
    as the teacher's do, have a large one and are always kept. Where more than half would be kept, all are, exactly:
    (gradient, None). Whether that is so does not depend on the draw, or the estimate would be biased. Draws from
    torch's own generator.
    """
    largest = torch.maximum(gradient.amax(0), -gradient.amin(0)).to(wide(gradient.dtype))
    chance = (largest / threshold).clamp(max=1)
    if not chance.sum() <= len(chance) / 2:  # NaN stays in and is seen
        return gradient, None
    ids = (torch.rand_like(chance) < chance).nonzero().squeeze(-1)
    return gradient.index_select(1, ids).div_(chance[ids]), ids


def hidden_gradient(gradient: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    """gradient [n, V] @ weight [V, D], or of some ids [K] only: gradient [n, K] @ weight[ids]."""
    if ids is None:
        return torch.mm(gradient, weight)
    total = weight.new_zeros(len(gradient), weight.shape[1], dtype=wide(weight.dtype))
    for part in _blocks(len(ids), weight.shape[1]):
        total += torch.mm(gradient[:, part], weight.index_select(0, ids[part]))
    return total


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor, ids: Tensor | None, fresh: bool) -> None:
    """Add gradient [n, V].T @ hidden [n, D] to total [V, D], or write it if ``fresh``; or add to the rows of ids [K].

    A low-precision product is added in float32, by blocks of V: there is no such matmul on every device.
    """
    if ids is None and total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden, beta=0 if fresh else 1)
        return
    for part in _blocks(gradient.shape[1], hidden.shape[1]):
        product = torch.mm(gradient[:, part].t(), hidden)
        if ids is not None:
            total.index_add_(0, ids[part], product.to(total.dtype))
        elif fresh:
            total[part] = product
        else:
            total[part].add_(product)


def _blocks(rows: int, width: int) -> list[slice]:
    size = max(1, _BLOCK // max(1, width))
    return [slice(start, start + size) for start in range(0, rows, size)]

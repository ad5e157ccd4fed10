"""How much each layer matters: what the divergence from the whole network is without it. One pass, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.divergences import forward_kl
from stillroom.errors import UsageError
from stillroom.language import next_token
from stillroom.network import device_of
from stillroom.progress import bar
from stillroom.students.pruning.rebuilding import batches_of, layers_of, rows_of, tokens_of
from stillroom.types import Batch, Examples, Projected


@dataclass(frozen=True)
class LayerScores:
    """One number per layer, higher = matters more.

    ``kl``: mean KL(whole || without this layer), nats per position. ``influence``: 1 - cosine between the hidden states
    before and after the layer, mean over positions (block influence, ShortGPT, arXiv 2403.03853, equation 1).
    """

    kl: tuple[float, ...]
    influence: tuple[float, ...]
    positions: int  # that both means are over


@torch.no_grad()
def importance_of_layers(
    net: Any,
    examples: Examples,
    *,
    rows: int | None = 8,
    batch_size: int = 4,
    ids: Tensor | None = None,
    progress: bool = False,
) -> LayerScores:
    """Remove each layer alone and measure: exact, over the positions with labels of ``rows`` rows spread evenly.

    ``examples``: packed tokens of the network's own tokenizer. ``ids``: only these compete (those of a cut vocabulary):
    cheaper, and the divergence that a student of that vocabulary sees. Only the layers after the removed one are
    computed again. Memory: the inputs of all layers for one batch, and chunks of logits.
    Raises UsageError for a network that cannot be cut and a sample that cannot be used.
    """
    layers = layers_of(net)
    kl = torch.zeros(len(layers), dtype=torch.float64)
    influence, positions = torch.zeros_like(kl), 0
    was_training = net.training
    net.eval()
    try:
        with bar("importance of layers", 0, shown=progress) as step:
            for some in batches_of(rows_of(examples, rows), batch_size):
                traced = _Trace(net, examples.batch(some))
                positions += traced.count
                for number in range(len(layers) if traced.count else 0):
                    kl[number] += traced.divergence_without(number, ids)
                    influence[number] += traced.influence(number)
                step(len(some))
    finally:
        net.train(was_training)
    if positions == 0:
        raise UsageError("the calibration rows have no position with a label. Give other rows, or more of them.")
    return LayerScores(tuple((kl / positions).tolist()), tuple((influence / positions).tolist()), positions)


class _Trace:
    """One batch through the network, with what entered every layer."""

    def __init__(self, net: Any, batch: Batch) -> None:
        self.layers, self.norm = layers_of(net), net.get_decoder().norm
        self.calls: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []  # what entered, and the layer as it was called
        hooks = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self.layers]
        hooks.append(self.norm.register_forward_pre_hook(self._keep, with_kwargs=True))  # its input: the last output
        try:
            tokens, positions, self.mask = tokens_of(batch, device_of(net))
            self.whole = next_token(net, tokens, positions)[self.mask]
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        entered = args[0] if args else given.pop("hidden_states")
        self.calls.append((entered, lambda hidden: _first(module(hidden, *args[1:], **given))))

    @property
    def count(self) -> int:
        return int(self.mask.sum())

    def influence(self, number: int) -> Tensor:
        before, after = (self.calls[n][0][self.mask].float() for n in (number, number + 1))
        return (1 - torch.cosine_similarity(before, after, dim=-1)).double().sum().cpu()

    def divergence_without(self, number: int, ids: Tensor | None) -> Tensor:
        hidden = self.calls[number][0]
        for _, layer in self.calls[number + 1 : len(self.layers)]:
            hidden = layer(hidden)
        without = Projected(
            self.norm(hidden)[self.mask], self.whole.weight, self.whole.bias, self.whole.softcap, self.whole.scale
        )
        return forward_kl(among(without, ids), among(self.whole, ids)).double().sum().cpu()


def among(logits: Projected, ids: Tensor | None) -> Projected:
    """The same logits over these ids only."""
    if ids is None:
        return logits
    bias = None if logits.bias is None else logits.bias[ids]
    return Projected(logits.hidden, logits.weight[ids], bias, logits.softcap, logits.scale)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

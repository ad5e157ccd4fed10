"""How much heads, neurons and channels are used: mean activations on a sample, one pass, batch by batch.

After Minitron (arXiv 2407.14679, section 2.2): mean of magnitudes over the positions of a row, L2 norm over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UsageError
from stillroom.language import next_token
from stillroom.network import device_of
from stillroom.students.pruning.rebuilding import batches_of, layers_of, rows_of, tokens_of, unsupported
from stillroom.types import Examples


@dataclass(frozen=True, eq=False)
class WidthScores:
    """Scores of a network's units, higher = used more, float64 on the CPU. L layers, G groups of heads."""

    heads: Tensor  # [L, G] L2 norms of the heads' outputs, added up over the heads of a group
    ffn: Tensor  # [L, F] magnitudes of what enters down_proj
    hidden: Tensor  # [D] magnitudes of what the norms give, added up over all of them
    energy: Tensor  # [norms, D] each channel's share of the squared length of what enters a norm, mean over positions
    positions: int

    def share(self, number: int, channels: Tensor) -> float:
        """The share of the squared length that enters the norm of this number in these channels."""
        return float(self.energy[number, channels].sum() / self.energy[number].sum())


def norms_of(net: Any) -> dict[str, nn.Module]:
    """The norms over all channels, by name. Raises UsageError for layers that are not the usual ones."""
    for number, layer in enumerate(layers_of(net)):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            try:
                layer.get_submodule(name)
            except AttributeError:
                raise unsupported(net, f"layer {number} has no {name}, so its width has no known meaning") from None
    size = net.config.hidden_size
    decoder = net.get_decoder()
    prefix = next(name for name, module in net.named_modules() if module is decoder)
    return {
        f"{prefix}.{name}": module
        for name, module in decoder.named_modules()
        if "norm" in name.rpartition(".")[2] and getattr(module, "weight", torch.empty(0)).shape == (size,)
    }


def head_size(net: Any) -> int:
    """Features of one attention head."""
    config = net.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def importance_of_width(net: Any, examples: Examples, *, rows: int | None = 32, batch_size: int = 4) -> WidthScores:
    """Measure heads, neurons and channels on ``rows`` rows spread evenly over packed tokens.

    Raises UsageError for a network whose layers are not the usual ones and a sample that cannot be used.
    """
    norms = list(norms_of(net).values())
    sums = _Sums(net, len(norms))
    was_training = net.training
    net.eval()
    try:
        with sums.listening(net, norms):
            for some in batches_of(rows_of(examples, rows), batch_size):
                tokens, places, sums.mask = tokens_of(examples.batch(some), device_of(net))
                next_token(net, tokens, places)
                sums.positions += int(sums.mask.sum())
    finally:
        net.train(was_training)
    if sums.positions == 0:
        raise UsageError("the calibration rows have no position with a label. Give other rows, or more of them.")
    return WidthScores(sums.heads.sqrt(), sums.ffn.sqrt(), sums.hidden.sqrt().sum(0), sums.energy, sums.positions)


class _Sums:
    """Sums of squares over rows, filled by hooks on what enters o_proj, down_proj and the norms."""

    def __init__(self, net: Any, norms: int) -> None:
        config, layers = net.config, len(layers_of(net))
        self.groups, self.size = config.num_key_value_heads, head_size(net)
        self.heads = torch.zeros(layers, self.groups, dtype=torch.float64)
        self.ffn = torch.zeros(layers, config.intermediate_size, dtype=torch.float64)
        self.hidden = torch.zeros(norms, config.hidden_size, dtype=torch.float64)
        self.energy = torch.zeros_like(self.hidden)
        self.mask, self.positions = torch.ones(1, 1, dtype=torch.bool), 0

    @contextmanager
    def listening(self, net: Any, norms: list[nn.Module]) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(layers_of(net)):
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(self._entering(self._head, number)))  # type: ignore[union-attr]
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(self._entering(self._neuron, number)))  # type: ignore[union-attr]
        for number, norm in enumerate(norms):
            hooks.append(norm.register_forward_pre_hook(self._entering(self._channel_in, number)))
            hooks.append(norm.register_forward_hook(self._leaving(number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, add: Callable[[int, Tensor], None], number: int) -> Callable[..., None]:
        return lambda _module, args: add(number, args[0])

    def _leaving(self, number: int) -> Callable[..., None]:
        def add(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self.hidden[number] += self._rows(output)

        return add

    def _head(self, number: int, entering: Tensor) -> None:
        each = entering.unflatten(-1, (self.groups, -1, self.size))  # [B, T, G, heads of a group, head_dim]
        self.heads[number] += self._rows(each.float().norm(dim=-1).sum(-1))

    def _neuron(self, number: int, entering: Tensor) -> None:
        self.ffn[number] += self._rows(entering)

    def _channel_in(self, number: int, entering: Tensor) -> None:
        squares = entering[self.mask].double().square()
        self.energy[number] += (squares / squares.sum(-1, keepdim=True).clamp(min=1e-30)).sum(0).cpu()

    def _rows(self, values: Tensor) -> Tensor:
        """The sum over rows of the squared mean magnitude over positions, [units]."""
        counted = values.abs().double().masked_fill(~self.mask[..., None], 0).sum(1)
        return (counted / self.mask.sum(1)[:, None].clamp(min=1)).square().sum(0).cpu()

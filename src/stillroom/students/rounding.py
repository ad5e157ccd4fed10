"""Layers that compute with the integers they will ship with: what is rounded, to which scales, and how gradients pass.

int8: weights symmetric with one scale per output channel, a layer's input affine with one scale, the bias in int32.
int4: weights symmetric with one scale per group of a linear layer's inputs (per output channel elsewhere); the rest
stays float. Scales of weights follow from the weights; those of inputs are fixed before training (buffers), so neither
depends on how a batch was split.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.errors import UsageError, nearest

Precision = Literal["int8", "int4"]
INPUT = (-128, 127)
WEIGHT = {"int8": (-127, 127), "int4": (-8, 7)}
# int4: the share of the largest weight that the largest integer stands for is the one with the least squared error
CUTS = torch.linspace(1.0, 0.5, 11)
LEAST = 1e-12  # of a scale: channels of nothing but zeros have one too
BIAS = 2**30  # int32 with room for what is added


@dataclass(frozen=True)
class Rounding:
    """How a student is rounded: ``precision``, and for int4 how many inputs of a linear layer share a scale."""

    precision: Precision = "int8"
    group: int = 32

    def __post_init__(self) -> None:
        if self.precision not in WEIGHT:
            raise UsageError(f"precision is {self.precision!r}{nearest(str(self.precision), WEIGHT)}")
        if not isinstance(self.group, int) or self.group < 2:
            raise UsageError(f"group is {self.group!r}: give how many weights share a scale, such as 32.")


class Rounded(nn.Module):
    """What one layer rounds, and to which scales; it lies in the layer as ``layer.rounded``."""

    scale: Tensor
    zero: Tensor

    def __init__(self, rounding: Rounding):
        super().__init__()
        self.rounding = rounding
        if rounding.precision == "int8":
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("zero", torch.zeros((), dtype=torch.int32))

    def forward(self, layer: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias as the layer ships them; gradients pass as if only what is cut off were constant."""
        integers, scales = self.integers(layer)
        weight = _Straight.apply(layer.weight, spread(integers, scales).to(layer.weight.dtype))
        if self.rounding.precision == "int4":
            return inputs, weight, layer.bias
        inputs = torch.fake_quantize_per_tensor_affine(inputs.float(), self.scale, self.zero, *INPUT)  # type: ignore[arg-type]
        if layer.bias is None:
            return inputs, weight, None
        step = self.scale * scales.flatten()
        return inputs, weight, _Straight.apply(layer.bias, (layer.bias / step).round() * step)

    @torch.no_grad()
    def integers(self, layer: Any) -> tuple[Tensor, Tensor]:
        """The layer's weight as integers [O, ...] (in a float tensor), and their scales [O, groups]."""
        weight = layer.weight.float()
        rows = weight.reshape(len(weight) * groups_of(layer, self.rounding), -1)
        low, high = WEIGHT[self.rounding.precision]
        scales = self._scales(rows, layer)
        return (rows / scales).round().clamp(low, high).reshape(weight.shape), scales.reshape(len(weight), -1)

    def _scales(self, rows: Tensor, layer: Any) -> Tensor:
        low, high = WEIGHT[self.rounding.precision]
        whole = rows.abs().amax(1, keepdim=True) / high
        if self.rounding.precision == "int4":
            tried = whole.clamp(min=LEAST) * CUTS.to(rows.device).view(-1, 1, 1)  # [cuts, rows, 1]
            errors = ((rows / tried).round().clamp(low, high) * tried - rows).square().sum(-1, keepdim=True)
            return tried.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)
        if layer.bias is None:
            return whole.clamp(min=LEAST)
        room = layer.bias.float().abs().unsqueeze(1) / (self.scale * BIAS)  # so that the bias fits int32
        return torch.maximum(whole, room).clamp(min=LEAST)

    @torch.no_grad()
    def bias(self, layer: Any) -> tuple[Tensor, Tensor] | None:
        """int8: the bias as integers [O] and their scales [O]; None without a bias."""
        if layer.bias is None:
            return None
        _, scales = self.integers(layer)
        step = self.scale * scales.flatten()
        return (layer.bias / step).round().to(torch.int32), step

    def extra_repr(self) -> str:
        return f"{self.rounding.precision}"


def spread(integers: Tensor, scales: Tensor) -> Tensor:
    """The weights [O, ...] that integers [O, ...] and their scales [O, groups] stand for."""
    return (integers.reshape(scales.numel(), -1) * scales.reshape(-1, 1)).reshape(integers.shape)


def groups_of(layer: Any, rounding: Rounding) -> int:
    """How many scales an output channel has: one, unless int4's group divides a linear layer's inputs."""
    if rounding.precision == "int8" or not isinstance(layer, nn.Linear) or layer.in_features % rounding.group:
        return 1
    return layer.in_features // rounding.group


class _Straight(torch.autograd.Function):
    """Forward the rounded value, backward as if nothing had been rounded (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class RoundedLinear(nn.Linear):
    """nn.Linear that computes with what it ships."""

    rounded: Rounded

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(*self.rounded(self, input))


class RoundedConv2d(nn.Conv2d):
    """nn.Conv2d that computes with what it ships."""

    rounded: Rounded

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(*self.rounded(self, input))


KINDS: dict[type, type] = {nn.Linear: RoundedLinear, nn.Conv2d: RoundedConv2d}


def round_layers(net: nn.Module, rounding: Rounding, leave: tuple[str, ...] = ()) -> list[str]:
    """Let every linear layer and convolution of ``net`` compute rounded, but those at the paths ``leave``; their paths.

    In place; the names of parameters stay. Subclasses are left: what they do with their weights is their own affair.
    Batch normalisation that follows a layer in a Sequential becomes part of it first. Raises UsageError when there is
    no such layer, or they are rounded already.
    """
    if any(isinstance(module, Rounded) for module in net.modules()):
        raise UsageError("the network is rounded already. Start from the float student.")
    _fold_batch_norms(net)
    found = [name for name, module in net.named_modules() if type(module) in KINDS and name not in leave]
    if not found:
        raise UsageError("there is nothing to round: the network has no nn.Linear or nn.Conv2d.")
    for name in found:
        layer: Any = net.get_submodule(name)
        layer.__class__ = KINDS[type(layer)]  # the same layer: its parameters, hooks and name stay
        layer.rounded = Rounded(rounding).to(layer.weight.device)
    return found


def rounded_layers(net: nn.Module) -> dict[str, Any]:
    """The rounded layers by path."""
    return {
        name: module for name, module in net.named_modules() if isinstance(getattr(module, "rounded", None), Rounded)
    }


def unround_layers(net: nn.Module) -> None:
    """Back to plain layers, in place, with the float weights that their integers stand for."""
    for layer in rounded_layers(net).values():
        with torch.no_grad():
            layer.weight.copy_(spread(*layer.rounded.integers(layer)))
        layer.__class__ = type(layer).__mro__[1]
        del layer.rounded


def _fold_batch_norms(net: nn.Module) -> None:
    for chain in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        names = list(chain._modules)
        for first, second in itertools.pairwise(names):
            layer, norm = chain._modules[first], chain._modules[second]
            was_training = net.training
            if type(layer) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                chain._modules[first] = nn.utils.fuse_conv_bn_eval(layer.eval(), norm.eval())
            elif type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d:
                chain._modules[first] = nn.utils.fuse_linear_bn_eval(layer.eval(), norm.eval())
            else:
                continue
            chain._modules[second] = nn.Identity()
            chain.train(was_training)


def range_of(seen: Tensor) -> tuple[float, int]:
    """Scale and zero point of int8 for numbers like these: the range, always with 0, of the least squared error."""
    low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
    best, found = float("inf"), (1.0, 0)
    for cut in CUTS.tolist():
        scale = max((high - low) * cut / (INPUT[1] - INPUT[0]), LEAST)
        zero = max(INPUT[0], min(INPUT[1], round(INPUT[0] - low * cut / scale)))
        rounded = torch.fake_quantize_per_tensor_affine(seen, scale, zero, *INPUT)
        error = float((rounded - seen).double().square().sum())
        if error < best:
            best, found = error, (scale, zero)
    return found

"""Narrower layers: whole groups of heads, neurons, hidden channels; those that a sample uses least go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UsageError
from stillroom.students.pruning.activations import WidthScores, head_size, norms_of
from stillroom.students.pruning.rebuilding import Choice, layers_of, rebuilt, same_answers, unsupported

# what the rows and the columns of each matrix of a layer stand for
UNITS = {
    "q_proj": ("heads", "hidden"),
    "k_proj": ("keys", "hidden"),
    "v_proj": ("keys", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
}
PER_HEAD = ("q_norm", "k_norm")  # over the features of one head, the same for all
BY = "mean activation (Minitron)"


@dataclass(frozen=True, eq=False)
class _Kept:
    """Which units stay: groups [L, g], neurons [L, f], channels [d]; ascending."""

    groups: Tensor
    neurons: Tensor
    channels: Tensor
    heads_of_a_group: int
    head_size: int

    def index(self, unit: str, layer: int) -> Tensor:
        """Rows or columns of a matrix of this layer."""
        if unit == "hidden":
            return self.channels
        if unit == "ffn":
            return self.neurons[layer]
        block = self.head_size * (self.heads_of_a_group if unit == "heads" else 1)
        return (self.groups[layer][:, None] * block + torch.arange(block)).flatten()


def cut_width(
    net: Any,
    importance: WidthScores,
    *,
    hidden: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
) -> tuple[Any, tuple[Choice, ...]]:
    """A network of the same class with narrower layers, and a choice per kind of unit; None leaves a width as it is.

    ``importance``: ``importance_of_width(net, examples)``. ``heads``: query heads per layer; heads that share keys go
    together, so a multiple of their number. ``ffn``: neurons per layer, chosen in each layer. ``hidden``: channels, the
    same ones everywhere; norms are scaled so that on the sample their outputs keep their size though fewer channels are
    averaged. The size of a head stays and is written into the configuration.
    Minitron, arXiv 2407.14679; scaling the norms is ours (benchmarks/pruning.py shows its gain). Untrained, half
    of SmolLM2's neurons are nearer to the whole than twenty of its thirty layers, at fewer parameters.
    Raises UsageError for sizes that do not fit and layers of another build.
    """
    _check_sizes(net, importance, hidden, ffn, heads)
    config = net.config
    shared = config.num_attention_heads // config.num_key_value_heads
    kept = _Kept(
        _highest(importance.heads, None if heads is None else heads // shared),
        _highest(importance.ffn, ffn),
        _highest(importance.hidden, hidden),
        shared,
        head_size(net),
    )
    changes = {
        "hidden_size": len(kept.channels),
        "intermediate_size": kept.neurons.shape[1],
        "num_attention_heads": kept.groups.shape[1] * shared,
        "num_key_value_heads": kept.groups.shape[1],
        "head_dim": kept.head_size,
    }
    made = rebuilt(net, changes, _selected(net, kept))
    if hidden is None:
        tokens = torch.arange(8, device=next(net.parameters()).device) % net.get_input_embeddings().num_embeddings
        with _silenced(net, kept):
            same_answers(net, tokens, made, tokens)
    else:
        _keep_sizes(net, made, importance, kept.channels)
    return made, tuple(_choices(importance, kept, hidden=hidden, ffn=ffn, heads=heads))


def _check_sizes(net: Any, scores: WidthScores, hidden: int | None, ffn: int | None, heads: int | None) -> None:
    config, layers = net.config, len(layers_of(net))
    shared = config.num_attention_heads // config.num_key_value_heads
    sizes = {
        "hidden": (hidden, config.hidden_size, 1),
        "ffn": (ffn, config.intermediate_size, 1),
        "heads": (heads, config.num_attention_heads, shared),
    }
    for name, (size, most, step) in sizes.items():
        if size is not None and (not step <= size <= most or size % step):
            multiple = f", a multiple of {step} (so many heads share keys)" if step > 1 else ""
            raise UsageError(f"{name}={size} cannot be used: choose {step} to {most}{multiple}.")
    fits = (layers, config.num_key_value_heads), (layers, config.intermediate_size), (config.hidden_size,)
    if (scores.heads.shape, scores.ffn.shape, scores.hidden.shape) != fits:
        raise UsageError("the importance was measured on a network of other sizes. Measure this one.")


def _highest(scores: Tensor, count: int | None) -> Tensor:
    """The units of highest score along the last dimension, ascending."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., : scores.shape[-1] if count is None else count].sort(-1).values


def _selected(net: Any, kept: _Kept) -> dict[str, Tensor]:
    """The network's tensors without the units that go."""
    layers, head = layers_of(net), net.get_output_embeddings()
    prefix = next(path for path, module in net.named_modules() if module is layers) + "."
    of_channels = {f"{name}.{kind}" for name in norms_of(net) for kind in ("weight", "bias")}
    tables = {net.get_input_embeddings().weight.data_ptr(), head.weight.data_ptr()}
    bias = None if getattr(head, "bias", None) is None else head.bias.data_ptr()
    state: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        *_, module, kind = name.split(".")
        if module in UNITS and kind in ("weight", "bias") and name.startswith(prefix):
            layer = int(name[len(prefix) :].partition(".")[0])
            rows, columns = (kept.index(unit, layer).to(tensor.device) for unit in UNITS[module])
            state[name] = tensor[rows] if kind == "bias" else tensor[rows][:, columns]
        elif name in of_channels or tensor.data_ptr() in tables:
            state[name] = tensor[..., kept.channels.to(tensor.device)]
        elif (module in PER_HEAD and tensor.shape == (kept.head_size,)) or tensor.data_ptr() == bias:
            state[name] = tensor
        else:
            raise unsupported(net, f"nothing is known of the width of {name} {list(tensor.shape)}")
    return state


@contextmanager
def _silenced(net: Any, kept: _Kept) -> Iterator[None]:
    """The heads and neurons that go give nothing, for as long as this lasts."""
    hooks = []
    for number, layer in enumerate(layers_of(net)):
        for path, unit in (("self_attn.o_proj", "heads"), ("mlp.down_proj", "ffn")):
            hooks.append(layer.get_submodule(path).register_forward_pre_hook(_only(kept.index(unit, number))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _only(features: Tensor) -> Any:
    def silence(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heard = torch.zeros_like(args[0])
        heard[..., features] = args[0][..., features]
        return (heard, *args[1:])

    return silence


@torch.no_grad()
def _keep_sizes(net: Any, made: Any, scores: WidthScores, channels: Tensor) -> None:
    """A norm divides by the root mean square of fewer channels, and Gemma multiplies its embedding by sqrt(hidden)."""
    ratio = len(channels) / net.config.hidden_size
    norms = norms_of(made)
    for number, norm in enumerate(norms.values()):
        _scale(made, norm, math.sqrt(scores.share(number, channels) / ratio))
    before, after = net.get_input_embeddings(), made.get_input_embeddings()
    if hasattr(before, "embed_scale"):
        factor = float(before.embed_scale / after.embed_scale)
        after.weight.mul_(factor)
        if made.get_output_embeddings().weight is after.weight:
            _scale(made, made.get_decoder().norm, 1 / factor)


def _scale(made: Any, norm: nn.Module, factor: float) -> None:
    """Multiply what a norm gives. Its weight is the factor itself (Llama), or what is added to 1 (Gemma)."""
    weight: Any = norm.weight
    of_ones = norm(torch.ones_like(weight))
    for added in (0.0, 1.0):
        if torch.allclose(of_ones.float(), weight.float() + added, rtol=1e-2, atol=1e-3):
            weight.copy_((weight + added) * factor - added)
            return
    raise unsupported(made, f"{type(norm).__name__} is no root mean square norm")


def _choices(scores: WidthScores, kept: _Kept, **asked: int | None) -> Iterator[Choice]:
    found = {
        "heads": (scores.heads, kept.groups),
        "ffn": (scores.ffn, kept.neurons),
        "hidden": (scores.hidden, kept.channels),
    }
    for cut, (values, units) in found.items():
        if asked[cut] is not None:
            each = kept.heads_of_a_group if cut == "heads" else 1
            share = float(values.gather(-1, units).sum() / values.sum())
            facts = {"importance_kept": share, "positions": scores.positions}
            yield Choice(cut, BY, values.shape[-1] * each, units.shape[-1] * each, facts=facts)

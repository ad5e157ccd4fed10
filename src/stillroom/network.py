"""How an ordinary network (tensors in, tensors out) answers a Batch: adapt the columns, run, catch features.

Teachers and students share this; neither knows of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.errors import DataError, SignalError, UsageError, nearest
from stillroom.language.answers import next_token
from stillroom.types import Batch, Column, Dense, Projected, Signal

Answers = Literal["logits", "values", "next_token"]
Adapter = Callable[[Mapping[str, Column]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Columns:
    """The adapter that passes named tensor columns to the network, in this order."""

    names: tuple[str, ...] = ("x",)

    def __call__(self, inputs: Mapping[str, Column]) -> tuple[Tensor, ...]:
        return tuple(self._column(inputs, name) for name in self.names)

    @staticmethod
    def _column(inputs: Mapping[str, Column], name: str) -> Tensor:
        if name not in inputs:
            raise DataError(f"there is no column {name!r}{nearest(name, inputs)}")
        column = inputs[name]
        if not isinstance(column, Tensor):
            raise DataError(f"column {name!r} holds text; a network takes tensors. Give the model a text adapter.")
        return column


def device_of(net: nn.Module) -> torch.device:
    """Where the network's first parameter or buffer lies; the CPU for a network without any."""
    for tensor in chain(net.parameters(), net.buffers()):
        return tensor.device
    return torch.device("cpu")


def in_evaluation(model: Any, features: tuple[str, ...] = ()) -> Any:
    """The model that also gives these features, its network (if it has one) in evaluation mode."""
    for net in (model, getattr(model, "net", None)):
        if isinstance(net, nn.Module):
            net.eval()
    return model.with_features(features) if features and hasattr(model, "with_features") else model


@contextmanager
def captured(net: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Catch the outputs of the modules at these dotted paths while the network runs; the network is left as it was.

    A module that is called again within one pass adds 'path#2', 'path#3', ...: nothing is overwritten. Of a tuple
    output, the first tensor is kept. Raises UsageError with the nearest name for a path that is not in the network.
    """
    caught: dict[str, Tensor] = {}
    inner = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    modules = dict(inner.named_modules())
    hooks = []

    def hook_for(path: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else _first_tensor(output, path)
            name, times = path, 1
            while name in caught:
                times += 1
                name = f"{path}#{times}"
            caught[name] = tensor

        return keep

    try:
        for path in paths:
            if path not in modules:
                known = [name for name in modules if name]
                raise UsageError(f"the network has no module {path!r}{nearest(path, known)}")
            hooks.append(modules[path].register_forward_hook(hook_for(path)))
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(output: Any, path: str) -> Tensor:
    items = output.values() if isinstance(output, Mapping) else output
    for item in items if isinstance(items, list | tuple) or isinstance(output, Mapping) else ():
        if isinstance(item, Tensor):
            return item
    raise SignalError(f"module {path!r} gives {type(output).__name__}, not a tensor. Name a module inside it.")


def answer(
    net: nn.Module, batch: Batch, adapter: Adapter, answers: Answers = "logits", features: Sequence[str] = ()
) -> Signal:
    """Run ``net`` on the adapted columns and wrap what it returns. Runs in whatever mode and grad state it is in.

    The network may return a Tensor (logits or values by ``answers``), an object with ``.logits``, or a Signal;
    ``answers='next_token'``: it is a causal language model of transformers, the tensors are its tokens and positions.
    """
    device = device_of(net)
    tensors = tuple(tensor.to(device) for tensor in adapter(batch.inputs))
    run = functools.partial(next_token, net) if answers == "next_token" else net
    if not features:
        return _as_signal(run(*tensors), answers, {})
    with captured(net, features) as caught:
        output = run(*tensors)
    return _as_signal(output, answers, caught)


def _as_signal(output: Any, answers: Answers, features: Mapping[str, Tensor]) -> Signal:
    if isinstance(output, Signal):
        return output
    if isinstance(output, Projected):
        return Signal(logits=output, features=dict(features))
    tensor = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(tensor, Tensor):
        raise SignalError(f"the network returned {type(output).__name__}; expected a tensor, '.logits' or a Signal.")
    if answers == "logits":
        return Signal(logits=Dense(tensor), features=dict(features))
    return Signal(values=tensor, features=dict(features))

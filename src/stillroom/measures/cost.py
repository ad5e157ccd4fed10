"""What a model costs: parameters, bytes, FLOPs, seconds. Exact where it can be counted, measured where it cannot."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillroom.measures.bootstrap import Interval, median_interval
from stillroom.types import Batch, identity_of

WARM_UP = 5
RUNS = 30  # at least
MOST_RUNS = 200
SECONDS = 1.0  # a fast model is run more often, up to MOST_RUNS, within this time
THREADS = 1


def networks_of(model: Any) -> list[nn.Module]:
    """The networks that a model holds: itself, its ``.net``, or those in its fields (an ensemble's members)."""
    found: dict[int, nn.Module] = {}
    _collect(model, found, depth=4)
    return list(found.values())


def _collect(thing: Any, found: dict[int, nn.Module], depth: int) -> None:
    if isinstance(thing, nn.Module):
        found[id(thing)] = thing
    elif depth == 0 or isinstance(thing, str | bytes | Tensor | type):
        return
    elif isinstance(getattr(thing, "net", None), nn.Module):
        found[id(thing.net)] = thing.net
    elif isinstance(thing, Mapping):
        for item in thing.values():
            _collect(item, found, depth - 1)
    elif isinstance(thing, list | tuple):
        for item in thing:
            _collect(item, found, depth - 1)
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            _collect(getattr(thing, field.name), found, depth - 1)


@contextmanager
def answering(models: Sequence[Any]) -> Iterator[None]:
    """Evaluation mode, no gradient; every module gets its own mode back afterwards."""
    modules = {id(m): m for model in models for net in networks_of(model) for m in net.modules()}
    modes = {key: module.training for key, module in modules.items()}
    try:
        for model in models:
            for net in networks_of(model):
                net.eval()
        with torch.no_grad():
            yield
    finally:
        for key, module in modules.items():
            module.training = modes[key]


def parameter_count(model: Any) -> int | None:
    """How many numbers were learned, shared ones once; ``.parameters_count`` of a model without a network."""
    nets = networks_of(model)
    if nets:
        return sum(p.numel() for p in {id(p): p for net in nets for p in net.parameters()}.values())
    return _stated(model, "parameters_count")


def weight_bytes(model: Any) -> int | None:
    """The bytes of the weights in memory (parameters and saved buffers, shared ones once), or a model's ``.bytes``."""
    nets = networks_of(model)
    if not nets:
        return _stated(model, "bytes")
    tensors = {id(t): t for net in nets for t in net.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _stated(model: Any, name: str) -> int | None:
    found = getattr(model, name, None)
    return int(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def flops_per_example(model: Any, singles: Sequence[Batch]) -> int | None:
    """Floating-point operations of one answer: the mean over batches of one example; None without a network.

    Counted by torch's FlopCounterMode: a multiplication and an addition are two; matrix products, convolutions and
    attention count, look-ups in an embedding and element-wise functions count 0.
    """
    if not networks_of(model) or not singles:
        return None
    counter = FlopCounterMode(display=False)
    with answering([model]), counter:
        for batch in singles:
            model(batch)
    return round(counter.get_total_flops() / len(singles))


def answers_from_disk(model: Any) -> bool:
    """True for a recording: how fast it is read says nothing of how fast the model answers."""
    return bool(getattr(model, "answers_from_disk", False)) or identity_of(model).kind == "recording"


def latency(model: Any, singles: Sequence[Batch], runs: int = RUNS, seed: int = 0) -> Interval | None:
    """The median seconds of one answer at batch 1, from raw columns to numbers on the CPU, with its 95 % interval.

    One torch thread, evaluation mode, at least ``runs`` runs on different examples after a warm-up. None for a
    recording.
    """
    if answers_from_disk(model) or not singles:
        return None
    threads = torch.get_num_threads()
    taken: list[float] = []
    torch.set_num_threads(THREADS)
    try:
        with answering([model]):
            for i in range(WARM_UP):
                _timed(model, singles[i % len(singles)])
            end = time.perf_counter() + SECONDS
            while len(taken) < runs or (len(taken) < MOST_RUNS and time.perf_counter() < end):
                taken.append(_timed(model, singles[len(taken) % len(singles)]))
    finally:
        torch.set_num_threads(threads)
    return median_interval(taken, seed=seed)


def _timed(model: Any, batch: Batch) -> float:
    start = time.perf_counter()
    model(batch).to("cpu")  # waits for an accelerator: an answer counts when it has arrived
    return time.perf_counter() - start

"""What a causal language model costs: operations per token, tokens per second, bytes at work. Takes seconds."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from stillroom.language.writing import greedy
from stillroom.measures.bootstrap import Interval, median_interval
from stillroom.measures.cost import THREADS, answering, weight_bytes
from stillroom.measures.generations import causal_net
from stillroom.types import Examples

PROMPT = 128  # tokens that are read
TOKENS = 64  # written at most
FEWEST = 8  # runs, or tokens, however long they take
SECONDS = 2.0  # after which no further run is begun
WARM_UP = 2
REMEMBERED = 4  # tokens written while memory is measured


def language_costs(model: Any, examples: Examples, seed: int = 0) -> dict[str, Interval | None]:
    """flops_per_token, prefill and generation (tokens per second), memory (bytes); None without a causal network.

    At batch 1, one torch thread, a prompt of 128 tokens of these examples.
    """
    net = causal_net(model)
    if net is None:
        return dict.fromkeys(("flops_per_token", "prefill", "generation", "memory"))
    tokens = _tokens(net, examples).to(next(net.parameters()).device)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with answering([model]):
            return {
                "flops_per_token": Interval.exact(flops_per_token(net, tokens)),
                "prefill": prefill_speed(net, tokens, seed),
                "generation": generation_speed(net, tokens, seed),
                "memory": Interval.exact(memory(net, tokens)),
            }
    finally:
        torch.set_num_threads(threads)


def flops_per_token(net: Any, tokens: Tensor) -> int:
    """Floating-point operations for one token [1, P] -> number, head included: the mean over P tokens read at once.

    As FlopCounterMode counts them: matrix products and attention, two for a multiplication and an addition.
    """
    # the fused attention of a CPU is not known to the counter; its plain form is two matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(input_ids=tokens, use_cache=False)
    return round(counter.get_total_flops() / tokens.shape[1])


def prefill_speed(net: Any, tokens: Tensor, seed: int = 0) -> Interval:
    """Tokens per second at which a prompt [1, P] is read, up to the first new token: median and 95 % interval."""

    def read() -> None:
        int(net(input_ids=tokens, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())  # waits for an accelerator

    return _per_second(_timed(read), tokens.shape[1], seed)


def generation_speed(net: Any, tokens: Tensor, seed: int = 0) -> Interval:
    """Tokens per second written after a prompt [1, P], the prompt's own time aside: median and 95 % interval.

    Greedy, with transformers' cache, at most 64 tokens; the first ones warm up and are not counted.
    """
    writing = greedy(net, tokens, WARM_UP + TOKENS)
    for _ in range(WARM_UP):
        next(writing)
    taken, end = [], time.perf_counter() + SECONDS
    start = time.perf_counter()
    for _ in writing:
        now = time.perf_counter()
        taken.append(now - start)
        start = now
        if now > end and len(taken) >= FEWEST:
            break
    return _per_second(taken, 1, seed)


def memory(net: nn.Module, tokens: Tensor) -> int:
    """Bytes of the weights, and of the most tensors alive at once while a prompt [1, P] is read and 4 tokens written.

    Counted over torch's operations; what a kernel or an allocator needs for itself is not seen.
    """
    with Alive(net) as alive:
        for _ in greedy(net, tokens, REMEMBERED):
            pass
    return (weight_bytes(net) or 0) + alive.peak


class Alive(TorchDispatchMode):
    """While entered: ``peak``, the most bytes at once in tensors that operations made, the network's own aside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tokens(net: Any, examples: Examples) -> Tensor:
    """[1, P] tokens of the first examples, padding left out; again from the start where these are too few."""
    context = getattr(net.config, "max_position_embeddings", None) or 2 * PROMPT
    wanted = max(2, min(PROMPT, context - TOKENS - WARM_UP))
    found: list[int] = []
    for row in range(len(examples)):
        batch = examples.batch([row], None)
        tokens = batch.inputs["tokens"][0]
        found += tokens[batch.extra["documents"][0] >= 0].tolist()  # type: ignore[index]
        if len(found) >= wanted:
            break
    return torch.tensor([(found * -(-wanted // len(found)))[:wanted]])


def _timed(run: Callable[[], None]) -> list[float]:
    for _ in range(WARM_UP):
        run()
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < FEWEST or (len(taken) < TOKENS and time.perf_counter() < end):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def _per_second(seconds: list[float], tokens: int, seed: int) -> Interval:
    middle = median_interval(seconds, seed=seed)
    return Interval(tokens / middle.value, tokens / middle.high, tokens / middle.low)

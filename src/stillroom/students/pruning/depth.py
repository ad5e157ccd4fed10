"""Fewer layers: which ones go is measured, shown and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UsageError
from stillroom.students.pruning.importance import LayerScores
from stillroom.students.pruning.rebuilding import Choice, layers_of, rebuilt, same_answers

Scored = LayerScores | Sequence[float]  # one per layer, higher is kept


def cut_depth(
    net: Any,
    keep: int | Sequence[int],
    importance: Scored | Callable[[Any], Scored] | None = None,
    *,
    rounds: int = 1,
) -> tuple[Any, Choice]:
    """A network of the same class with fewer layers, and the choice.

    ``keep``: how many (those of highest ``importance``, in their order), or which ones (numbers from 0).
    ``importance``: what ``importance_of_layers`` gave, numbers per layer, or a function that measures a network: then
    ``rounds`` > 1 removes a part of the layers, measures again what is left, and so on (two layers that stand in for
    each other are both unimportant until one is gone).
    The configuration's number of layers and its lists per layer (layer_types) follow; attention layers are renumbered,
    so a cache works. Raises UsageError for a network that cannot be cut and a choice that cannot be made.
    """
    count = len(layers_of(net))
    if isinstance(keep, int):
        return _cut_by_importance(net, keep, importance, rounds)
    kept = sorted(set(keep))
    if not kept or len(kept) != len(keep) or not 0 <= kept[0] <= kept[-1] < count:
        raise UsageError(f"keep={list(keep)} cannot be used: name different layers of 0 to {count - 1}.")
    scores = () if importance is None else _numbers(_measured(importance, net), count)
    return _without(net, kept), Choice("layers", "the numbers given", count, len(kept), tuple(kept), scores)


def _cut_by_importance(
    net: Any, keep: int, importance: Scored | Callable[[Any], Scored] | None, rounds: int
) -> tuple[Any, Choice]:
    count = len(layers_of(net))
    if not 1 <= keep <= count:
        raise UsageError(f"keep={keep} cannot be used: the network has {count} layers.")
    if importance is None:
        raise UsageError(f"which {keep} of {count} layers? Give importance=importance_of_layers(net, examples).")
    if rounds < 1 or (rounds > 1 and not callable(importance)):
        raise UsageError(
            f"rounds={rounds} cannot be used: give 1, or a function as importance, which measures what is left."
        )
    kept, scores, current = list(range(count)), [0.0] * count, net
    by, facts = "the scores given", {}
    for number in range(1, rounds + 1):
        measured = _measured(importance, current)  # type: ignore[arg-type]
        for layer, score in zip(kept, _numbers(measured, len(kept)), strict=True):
            scores[layer] = score  # a removed layer keeps the score that it was removed for
        if isinstance(measured, LayerScores):
            by = "KL(whole || without it)" + (f", measured again in {rounds} rounds" if rounds > 1 else "")
            facts = {"positions": measured.positions}
        target = count - (count - keep) * number // rounds
        kept = sorted(sorted(kept, key=lambda layer: (-scores[layer], layer))[:target])
        if number < rounds:
            current = _without(net, kept)
    return _without(net, kept), Choice("layers", by, count, keep, tuple(kept), tuple(scores), facts)


def _measured(importance: Scored | Callable[[Any], Scored], net: Any) -> Scored:
    return importance(net) if callable(importance) else importance


def _numbers(scores: Scored, count: int) -> tuple[float, ...]:
    numbers = scores.kl if isinstance(scores, LayerScores) else tuple(float(score) for score in scores)
    if len(numbers) != count:
        raise UsageError(f"{len(numbers)} scores were given for {count} layers. Measure this network.")
    if any(number != number for number in numbers):
        raise UsageError("a layer's score is NaN: the network's own answers are. Check its weights and precision.")
    return numbers


def _without(net: Any, kept: Sequence[int]) -> Any:
    layers = layers_of(net)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in net.config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == len(layers):  # layer_types, no_rope_layers
            changes[name] = [value[number] for number in kept]
    prefix = next(name for name, module in net.named_modules() if module is layers) + "."
    places = {str(old): str(new) for new, old in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        number, _, rest = name[len(prefix) :].partition(".")
        if number in places:
            state[f"{prefix}{places[number]}.{rest}"] = tensor
    made = rebuilt(net, changes, state)
    tokens = torch.arange(8, device=next(net.parameters()).device) % net.get_input_embeddings().num_embeddings
    with _bypassed(layers, set(range(len(layers))) - set(kept)):
        same_answers(net, tokens, made, tokens)
    return made


@contextmanager
def _bypassed(layers: nn.ModuleList, numbers: set[int]) -> Iterator[None]:
    """These layers pass on what they get, for as long as this lasts."""
    for number in numbers:
        layers[number].forward = lambda hidden_states, *_args, **_kwargs: hidden_states  # type: ignore[method-assign]
    try:
        yield
    finally:
        for number in numbers:
            del layers[number].forward

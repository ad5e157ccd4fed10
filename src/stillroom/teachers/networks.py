"""Network: any PyTorch network as a teacher. Frozen in fact: evaluation mode, no gradient, a digest of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from stillroom import settings
from stillroom.digests import state_digest
from stillroom.errors import MissingFileError, UsageError
from stillroom.network import Adapter, Answers, Columns, answer
from stillroom.types import Batch, Identity, Signal


@dataclass(frozen=True, eq=False)
class Network:
    """A network that answers, a Model. Make one with ``from_network``, which also says who it is."""

    net: nn.Module
    adapter: Adapter
    answers: Answers
    features: tuple[str, ...]
    identity: Identity
    tokenizer: Any = None  # of a language model

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        with evaluating(self.net):
            return answer(self.net, batch, self.adapter, self.answers, self.features)

    def with_features(self, paths: tuple[str, ...]) -> Network:
        """The same teacher that also gives the outputs of these modules."""
        return dataclasses.replace(self, features=tuple(dict.fromkeys((*self.features, *paths))))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module; those that were training train again afterwards.

    A teacher may share its network with a student that trains, or be switched by mistake: dropout and batch
    statistics must not reach its answers either way.
    """
    training = [module for module in net.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def from_network(
    net: nn.Module | str,
    adapter: Adapter | None = None,
    *,
    answers: Answers = "logits",
    features: tuple[str, ...] = (),
    classes: tuple[str, ...] | None = None,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    folder: Path | None = None,
    **known: Any,
) -> Network:
    """A teacher from a network, or from a factory named 'my_file.py:factory' or 'module:factory'.

    ``arguments`` go to the factory; ``weights`` is a .safetensors file, or a .pt / .pth file of plain tensors, and
    must fit exactly; names of files are looked up from ``folder``. ``classes`` is the order of its logits. ``known``:
    what else is known of it, as in Identity: name, licence, source, route, revision.

    The network is put in evaluation mode; its inputs are moved to where its parameters lie. Raises UsageError for
    weights that do not fit, MissingFileError for a file that is not there.
    """
    given = net if isinstance(net, str) else None
    built = _built(net, arguments, folder)
    if weights is not None:
        load_weights(built, (folder or Path()) / weights)
    unknown = set(known) - {"name", "licence", "source", "route", "revision"}
    if unknown:
        raise UsageError(f"from_network has no setting {sorted(unknown)[0]!r}; known: name, licence, source, route.")
    about = {"name": given or type(built).__name__, "source": given or "a network in memory", **known}
    built.eval()
    order = tuple(classes) if classes else None
    return Network(
        net=built,
        adapter=adapter or Columns(),
        answers=answers,
        features=tuple(features),
        identity=Identity(digest=state_digest(built.state_dict()), classes=order, **about),
    )


def from_factory(
    factory: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    weights: str | None = None,
    columns: tuple[str, ...] = ("x",),
    answers: Answers = "logits",
    classes: tuple[str, ...] | None = None,
    folder: Path | None = None,
    **known: Any,
) -> Network:
    """``from_network`` in a recipe's words: 'my_file.py:factory', its ``arguments``, and the ``columns`` it takes.

    ``known``: name, licence, source, route, revision. Raises UsageError when ``weights`` are not given: a network of
    random weights teaches nothing. A factory that loads its own says so with weights='own'.
    """
    if weights is None:
        raise UsageError(
            f"teacher {factory}: give weights='file.safetensors', or weights='own' if the factory loads its own."
        )
    found = None if weights == "own" else weights
    adapter = Columns((columns,) if isinstance(columns, str) else tuple(columns))
    return from_network(
        factory,
        adapter,
        answers=answers,
        classes=classes if answers == "logits" else None,
        arguments=arguments,
        weights=found,
        folder=folder,
        **known,
    )


def _built(net: nn.Module | str, arguments: Mapping[str, Any] | None, folder: Path | None) -> nn.Module:
    if isinstance(net, nn.Module):
        if arguments:
            raise UsageError("arguments are for a factory; this network is built already.")
        return net
    built = settings.resolve(net, folder)(**dict(arguments or {}))
    if not isinstance(built, nn.Module):
        raise UsageError(f"{net} returned {type(built).__name__}; a teacher's factory returns a torch.nn.Module.")
    return built


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state into the network, every name and shape of it. Nothing is unpickled but tensors.

    Raises UsageError that names missing, unknown and misshapen entries: a teacher whose weights were loaded in part
    answers, and is silently wrong.
    """
    if not path.is_file():
        raise MissingFileError(f"the teacher's weights {path} do not exist.")
    state = load_file(path) if path.suffix == ".safetensors" else _load_plain(path)
    wanted = net.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in state]
    wrong += [f"unknown {name}" for name in state if name not in wanted]
    wrong += [
        f"{name} is {list(state[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UsageError(f"{path.name} does not fit the network: {'; '.join(wrong[:4])}{more}. Nothing was loaded.")
    net.load_state_dict(state)


def _load_plain(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError...: all mean 'not plain tensors'
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path.name} is not a file of plain tensors ({reason}). Pickled objects run code and are never loaded; "
            "save net.state_dict() with safetensors.torch.save_file."
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path.name} does not hold a state dict (name -> tensor). Save net.state_dict().")
    return dict(state)

"""A smaller network of the same class from selected tensors, and the record of what was chosen.

What can be cut: causal language models of transformers whose decoder is a list of equal layers (Llama, Mistral, Qwen,
Gemma 3, SmolLM and their like). What cannot: encoder-decoders, layers under another name (GPT-2), layers that share
keys or have embeddings of their own (Gemma 3n), images beside text. A cut is compared with the network it came from as
it is made, so a family that computes otherwise is refused and never cut wrongly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import UsageError
from stillroom.language import next_token
from stillroom.network import Columns
from stillroom.types import Batch, Examples

SHOWN = 128  # a list of kept units that is longer says its length only


@dataclass(frozen=True)
class Choice:
    """What one cut kept and why. ``kept`` are the old numbers; ``scores`` belong to the old units, higher is kept."""

    cut: str  # "layers", "vocabulary", "ffn", "heads", "hidden"
    by: str  # how the units were compared
    before: int
    after: int
    kept: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def removed(self) -> tuple[int, ...]:
        """The old numbers that are gone."""
        kept = set(self.kept)
        return tuple(number for number in range(self.before) if number not in kept) if kept else ()

    def describe(self) -> dict[str, Any]:
        """As plain JSON, for student.json. Of more than 128 units, only how many were kept."""
        said: dict[str, Any] = {"cut": self.cut, "by": self.by, "before": self.before, "after": self.after}
        if self.kept and self.before <= SHOWN:
            said |= {"kept": list(self.kept), "removed": list(self.removed)}
        if self.scores and self.before <= SHOWN:
            said["scores"] = [float(f"{score:.6g}") for score in self.scores]
        return {**said, **self.facts}

    def __str__(self) -> str:
        facts = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in self.facts.items())
        gone = f"; removed {', '.join(map(str, self.removed))}" if self.kept and self.before <= SHOWN else ""
        return f"{self.cut}: {self.before} -> {self.after} by {self.by}{gone}" + (f"; {facts}" if facts else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def layers_of(net: Any) -> nn.ModuleList:
    """The decoder's layers. Raises UsageError for a network that cannot be cut."""
    name = type(net).__name__
    if hasattr(net, "merge_and_unload"):
        raise UsageError(f"{name} has adapters. Merge them first (net.merge_and_unload()), then cut.")
    if getattr(net.config, "quantization_config", None) is not None:
        raise UsageError(f"{name} is quantised. Load it dequantised (stillroom.language.load_causal), then cut.")
    decoder = net.get_decoder() if hasattr(net, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise unsupported(net, "its decoder has no list 'layers' and final 'norm'")
    if getattr(net.config, "num_hidden_layers", None) != len(layers):
        raise unsupported(net, "its configuration does not say num_hidden_layers at its top")
    return layers


def rebuilt(net: Any, changes: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """A network of the same class with a changed configuration and these tensors; evaluation mode, all trainable."""
    config = copy.deepcopy(net.config)
    for name, value in changes.items():
        setattr(config, name, value)
    _check_sizes(net, config)
    with torch.random.fork_rng(devices=[]):
        made = type(net)(config)
    try:
        # assigned, not copied: parameters keep their own precision, and buffers that are computed keep theirs
        made.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise unsupported(net, str(error).splitlines()[-1].strip()) from None
    made.tie_weights()
    made.to(next(net.parameters()).device)
    made.generation_config = copy.deepcopy(net.generation_config)
    return made.eval().requires_grad_(True)


def _check_sizes(net: Any, config: Any) -> None:
    """Refuse now what transformers would refuse when the folder is written."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        getattr(config, "validate", lambda: None)()  # not in every version
    except StrictDataclassError as error:
        raise UsageError(f"{type(net).__name__} does not exist in these sizes: {str(error).splitlines()[-1]}") from None


@torch.no_grad()
def same_answers(one: Any, its_tokens: Tensor, other: Any, other_tokens: Tensor) -> None:
    """Raise UsageError unless both networks give the same last hidden states [1, T, D] on their tokens [T]."""
    positions = torch.arange(len(its_tokens), device=its_tokens.device)[None]
    was_training = one.training
    one.eval()
    try:
        expected = next_token(one, its_tokens[None], positions).hidden.float()
    finally:
        one.train(was_training)
    found = next_token(other, other_tokens[None], positions).hidden.float()
    # low precisions add up in another order; a wrong cut is wrong by as much as the values themselves
    if not (found - expected).norm() <= 0.02 * expected.norm():
        raise unsupported(one, "the cut network answers otherwise than the original without the removed parts")


def rows_of(examples: Examples, rows: int | None) -> list[int]:
    """The calibration sample: this many rows, evenly spread. None: all of them."""
    count = len(examples)
    if (rows is not None and rows < 1) or count == 0:
        raise UsageError(f"rows={rows} of {count} examples cannot be used: a calibration needs 1 row or more.")
    taken = count if rows is None else min(rows, count)
    return [number * count // taken for number in range(taken)]


def batches_of(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """The rows, ``size`` at a time."""
    if size < 1:
        raise UsageError(f"batch_size={size} cannot be used: choose 1 row or more.")
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def tokens_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and mask of a packed batch, [B, T] each, on a device."""
    tokens, positions = (column.to(device) for column in Columns(("tokens", "positions"))(batch.inputs))
    mask = torch.ones_like(tokens, dtype=torch.bool) if batch.mask is None else batch.mask.to(device)
    return tokens, positions, mask


def unsupported(net: Any, reason: str) -> UsageError:
    """The error for a network of another build, with what is in the way."""
    return UsageError(
        f"{type(net).__name__} cannot be cut: {reason}. Causal language models of transformers whose decoder is a list "
        "of equal layers can (Llama, Mistral, Qwen, Gemma 3, SmolLM); for others, use students.causal.fresh."
    )

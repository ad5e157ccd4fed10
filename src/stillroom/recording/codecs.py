"""What of the teacher's answer is kept, and how it becomes arrays with one row for each example.

A codec is a frozen dataclass, so it is its own configuration. Nothing here touches a disk or runs a network.
Letters: B examples, T positions, V vocabulary, K kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from stillroom.digests import key_hash
from stillroom.errors import SignalError, UsageError, nearest
from stillroom.recording.rows import (
    FLOATS,
    Facts,
    Key,
    Rows,
    decode_all,
    decode_logits,
    log_softmax,
    over_positions,
    round_to,
    widened,
)
from stillroom.types import Projected, Signal, Sparse

FloatName = Literal["float32", "float16", "bfloat16"]

LARGEST_SEED = 2**53  # what every JSON reader keeps exactly


@dataclass(frozen=True, eq=False)
class Kept:
    """What a codec made of one batch: ``rows`` for the shards, ``facts`` for the manifest."""

    rows: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


class Codec(Protocol):
    """Keeps a part of a Signal. ``decode`` is given every array of the recording and takes those it wrote."""

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept: ...

    def decode(self, rows: Rows, facts: Facts) -> Signal: ...


@dataclass(frozen=True)
class Everything:
    """Logits, values, features and parts as the teacher gave them, rounded to ``dtype`` when it is smaller.

    Projected logits are computed; Sparse logits stay Sparse; text is not kept. Decoded floats are float32.
    """

    dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        _check_dtype(self, self.dtype, FLOATS)

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        kept = Kept({})
        self._encode(signal, keys, "", kept)
        if not kept.rows:
            raise SignalError(
                f"keep=Everything() keeps logits, values, features and parts, but the teacher gives "
                f"{list(signal.given)}. Choose a teacher that gives one of them."
            )
        return kept

    def _encode(self, signal: Signal, keys: Sequence[Key], prefix: str, kept: Kept) -> None:
        if isinstance(signal.logits, Sparse):
            for name in ("ids", "log_probs", "rest"):
                kept.rows[f"{prefix}logits.{name}"] = getattr(signal.logits, name).cpu()
            kept.rows[f"{prefix}logits.ids"] = signal.logits.ids.cpu().to(torch.int32)
            kept.facts[f"{prefix}logits"] = {"vocabulary": signal.logits.vocabulary, "sampled": signal.logits.sampled}
        elif signal.logits is not None:
            values = signal.logits.compute() if isinstance(signal.logits, Projected) else signal.logits.values
            kept.rows[f"{prefix}logits.values"] = round_to(values, self.dtype, f"{prefix}logits", keys)
        if signal.values is not None:
            kept.rows[f"{prefix}values"] = round_to(signal.values, self.dtype, f"{prefix}values", keys)
        for name, tensor in signal.features.items():
            kept.rows[f"{prefix}features/{name}"] = round_to(tensor, self.dtype, f"features[{name!r}]", keys)
        for name, part in signal.parts.items():
            self._encode(part, keys, f"{prefix}parts/{quote(name, safe='')}/", kept)

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        return decode_all(rows, facts)


@dataclass(frozen=True)
class TopK:
    """The ``k`` largest log-probabilities at temperature 1 and the log of the tail's mass, in nats.

    k(4 + 4) + 4 bytes per position in float32, k(4 + 2) + 4 in float16 (the tail's mass stays float32).
    """

    k: int
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        _check_count(self, "k", self.k)
        _check_dtype(self, self.dtype, ("float32", "float16"))

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        logits = signal.need_logits(f"keep={self}")
        width = logits.ids.shape[-1] if isinstance(logits, Sparse) else logits.vocabulary
        if self.k > width:
            what = "entries" if isinstance(logits, Sparse) else "logits"
            raise UsageError(
                f"keep=TopK({self.k}) asks for {self.k} entries, but the teacher gives {width} {what}. "
                f"Use TopK({width}) or fewer, or Everything()."
            )
        if isinstance(logits, Sparse):
            ids, log_probs, rest = self._cut(logits)
        else:
            ids, log_probs, rest = over_positions(logits, self._choose)
        rows = {
            "logits.ids": ids.cpu().to(torch.int32),
            "logits.log_probs": log_probs.cpu().to(FLOATS[self.dtype]),  # below float16's range is probability 0
            "logits.rest": rest.cpu().float(),
        }
        return Kept(rows, {"logits": {"vocabulary": logits.vocabulary, "sampled": False}})

    def _choose(self, values: Tensor, _first: int) -> tuple[Tensor, Tensor, Tensor]:
        everything = log_softmax(values)
        log_probs, ids = everything.topk(self.k, dim=-1)
        # The others are summed for themselves: 1 - sum(kept) would lose every digit of a small tail.
        return ids, log_probs, everything.scatter(-1, ids, -torch.inf).logsumexp(-1)

    def _cut(self, logits: Sparse) -> tuple[Tensor, Tensor, Tensor]:
        if logits.sampled:
            raise SignalError(f"keep={self}: the teacher gives random draws, which have no largest entries.")
        log_probs, order = logits.log_probs.float().topk(self.k, dim=-1)
        others = logits.log_probs.float().scatter(-1, order, -torch.inf).logsumexp(-1)
        return logits.ids.gather(-1, order), log_probs, torch.logaddexp(others, logits.rest.float())

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        return Signal(logits=decode_logits(rows, facts))


@dataclass(frozen=True)
class Sampled:
    """``n`` independent draws from the teacher's softmax, with the teacher's own log-probability of each, in nats.

    Unbiased for forward KL and cross-entropy at temperature 1 (Anshumann et al. 2025, arXiv 2503.16870). The draws
    of an example depend on (seed, example id, view) only, not on its batch. 8n bytes per position.
    """

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count(self, "n", self.n)
        if not 0 <= self.seed < LARGEST_SEED:
            raise UsageError(f"{self}: the seed must be from 0 to 2**53 - 1.")

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        logits = signal.need_logits(f"keep={self}")
        if isinstance(logits, Sparse):
            raise SignalError(
                f"keep={self} draws from all logits, but the teacher gives {logits.ids.shape[-1]} of "
                f"{logits.vocabulary} entries. Keep TopK or Everything."
            )
        draws = torch.from_numpy(self._uniforms(keys, logits.shape[1:].numel()))

        def choose(values: Tensor, first: int) -> tuple[Tensor, Tensor]:
            below = values.double().softmax(-1).cumsum(-1)
            aim = draws[first : first + len(values)].to(values.device) * below[:, -1:]
            # The first id whose cumulative mass exceeds the aim: an id of probability 0 is never it.
            ids = torch.searchsorted(below, aim, right=True).clamp(max=values.shape[-1] - 1)
            return ids, log_softmax(values).gather(-1, ids)

        ids, log_probs = over_positions(logits, choose)
        rows = {"logits.ids": ids.cpu().to(torch.int32), "logits.log_probs": log_probs.cpu().float()}
        return Kept(rows, {"logits": {"vocabulary": logits.vocabulary, "sampled": True}})

    def _uniforms(self, keys: Sequence[Key], positions: int) -> np.ndarray:
        """[B * T, n] float64 in [0, 1): a generator of its own for each example."""
        drawn = np.empty((len(keys), positions, self.n))
        for row, (name, view) in enumerate(keys):
            generator = np.random.Generator(np.random.Philox(key=(self.seed << 64) | key_hash(name, view)))
            drawn[row] = generator.random((positions, self.n))
        return drawn.reshape(-1, self.n)

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        return Signal(logits=decode_logits(rows, facts))


@dataclass(frozen=True)
class Features:
    """The named features of the teacher; beside a codec for its logits: ``keep=(TopK(8), Features(("layer1",)))``."""

    names: tuple[str, ...]
    dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        if not names:
            raise UsageError("keep=Features(()) names no feature.")
        _check_dtype(self, self.dtype, FLOATS)

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept:
        rows = {}
        for name in self.names:
            if name not in signal.features:
                raise SignalError(
                    f"keep={self}: the teacher gives {list(signal.given)}, and no feature {name!r}"
                    f"{nearest(name, signal.features)} Ask the teacher for it with features=({name!r},)."
                )
            rows[f"features/{name}"] = round_to(signal.features[name], self.dtype, f"features[{name!r}]", keys)
        return Kept(rows)

    def decode(self, rows: Rows, facts: Facts) -> Signal:
        return Signal(features={name: widened(rows[f"features/{name}"]) for name in self.names})


def encode(codecs: Sequence[Codec], signal: Signal, keys: Sequence[Key]) -> Kept:
    """What all codecs keep. Raises UsageError when two keep the same thing."""
    total = Kept({})
    for codec in codecs:
        kept = codec.encode(signal, keys)
        if twice := {_place(name) for name in total.rows} & {_place(name) for name in kept.rows}:
            raise UsageError(f"keep={list(codecs)}: two of them keep {sorted(twice)}. Leave one out.")
        total.rows.update(kept.rows)
        total.facts.update(kept.facts)
    return total


def decode(codecs: Sequence[Codec], rows: Rows, facts: Facts) -> Signal:
    """The Signal that the codecs kept: CPU tensors without gradient."""
    signals = [codec.decode(rows, facts) for codec in codecs]
    return Signal(
        logits=next((s.logits for s in signals if s.logits is not None), None),
        values=next((s.values for s in signals if s.values is not None), None),
        features={name: tensor for s in signals for name, tensor in s.features.items()},
        parts={name: part for s in signals for name, part in s.parts.items()},
    )


def _place(name: str) -> str:
    return "logits" if name.startswith("logits.") else name


def _check_dtype(codec: object, dtype: str, allowed: Sequence[str] | Mapping[str, Any]) -> None:
    if dtype not in allowed:
        raise UsageError(f"{codec}: dtype {dtype!r} cannot be used{nearest(dtype, allowed)}")


def _check_count(codec: object, name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"{codec}: {name} must be a whole number from 1 on.")

"""What a codec is, how several work together, and the checks of their settings.

A codec is a frozen dataclass, so it is its own configuration. Nothing here touches a disk or runs a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from stillroom.errors import UsageError, nearest
from stillroom.recording.rows import Facts, Key, Rows
from stillroom.types import Signal


@dataclass(frozen=True, eq=False)
class Kept:
    """What a codec made of one batch: ``rows`` for the shards, ``facts`` for the manifest."""

    rows: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


class Codec(Protocol):
    """Keeps a part of a Signal. ``decode`` is given every array of the recording and takes those it wrote.

    May also have ``prepare(signal) -> dict[str, Tensor]``: arrays that are kept once for the whole recording, made
    from the answer to its first batch. ``encode`` and ``decode`` are then given them as a third argument.
    """

    def encode(self, signal: Signal, keys: Sequence[Key]) -> Kept: ...

    def decode(self, rows: Rows, facts: Facts) -> Signal: ...


def prepare(codecs: Sequence[Codec], signal: Signal) -> dict[str, Tensor]:
    """What all codecs keep once, made from the answer to the first batch."""
    found: dict[str, Tensor] = {}
    for codec in codecs:
        if make := getattr(codec, "prepare", None):
            found |= make(signal)
    return found


def encode(codecs: Sequence[Codec], signal: Signal, keys: Sequence[Key], once: Rows | None = None) -> Kept:
    """What all codecs keep. Raises UsageError when two keep the same thing."""
    total = Kept({})
    for codec in codecs:
        kept = codec.encode(signal, keys, *_once(codec, once))
        if twice := {_place(name) for name in total.rows} & {_place(name) for name in kept.rows}:
            raise UsageError(f"keep={list(codecs)}: two of them keep {sorted(twice)}. Leave one out.")
        total.rows.update(kept.rows)
        total.facts.update(kept.facts)
    return total


def decode(codecs: Sequence[Codec], rows: Rows, facts: Facts, once: Rows | None = None) -> Signal:
    """The Signal that the codecs kept: CPU tensors without gradient."""
    signals = [codec.decode(rows, facts, *_once(codec, once)) for codec in codecs]
    return Signal(
        logits=next((s.logits for s in signals if s.logits is not None), None),
        values=next((s.values for s in signals if s.values is not None), None),
        features={name: tensor for s in signals for name, tensor in s.features.items()},
        parts={name: part for s in signals for name, part in s.parts.items()},
        text=next((s.text for s in signals if s.text is not None), None),
    )


def bytes_kept(codecs: Sequence[Codec], signal: Signal, keys: Sequence[Key]) -> tuple[int, int]:
    """Bytes of these answers as the codecs write them, and bytes kept once for the whole recording."""
    once = prepare(codecs, signal)
    rows = encode(codecs, signal, keys, once).rows
    rows_bytes, once_bytes = (sum(t.numel() * t.element_size() for t in part.values()) for part in (rows, once))
    return rows_bytes, once_bytes


def _once(codec: Codec, once: Rows | None) -> tuple[Rows, ...]:
    return (once or {},) if hasattr(codec, "prepare") else ()


def _place(name: str) -> str:
    return "logits" if name.startswith("logits.") else name


def check_dtype(codec: object, dtype: str, allowed: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises UsageError, with the nearest name, for a precision that the codec does not have."""
    if dtype not in allowed:
        raise UsageError(f"{codec}: dtype {dtype!r} cannot be used{nearest(dtype, allowed)}")


def check_count(codec: object, name: str, count: int) -> None:
    """Raises UsageError for what is no whole number from 1 on."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"{codec}: {name} must be a whole number from 1 on.")


def check_bits(codec: object, bits: int | None) -> None:
    """Raises UsageError for levels that no probability can be read back from."""
    if bits is not None and (isinstance(bits, bool) or bits not in range(4, 9)):
        raise UsageError(f"{codec}: bits must be a whole number from 4 to 8.")

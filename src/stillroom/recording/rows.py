"""Tensors of a Signal <-> rows: how they are rounded, computed by chunks, named and put together again.

The standard names: logits.values | logits.ids, logits.log_probs, logits.rest; values; features/NAME; parts/NAME/...
with NAME percent-encoded. Letters: B examples, T positions, V vocabulary, K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from stillroom.errors import SignalError
from stillroom.recording.levels import Entries, from_entries, join
from stillroom.types import Dense, Logits, Projected, Signal, Sparse

Key = tuple[str, int]  # (example id, view seed); -1 is the unaugmented view
Rows = Mapping[str, Tensor]  # name -> [B, ...] on the CPU
Facts = Mapping[str, Any]  # plain JSON that holds for every row: the vocabulary's size, how entries were chosen

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHUNK = 1 << 25  # logits that are held at once while a top-k or a sample is taken: 128 MiB in float32


def round_to(tensor: Tensor, dtype: str, what: str, keys: Sequence[Key]) -> Tensor:
    """``tensor`` on the CPU in ``dtype``; whole numbers and bools stay as they are.

    Raises SignalError, naming the example, for a number beyond the range of ``dtype``. A logit far below it may
    become -inf: its probability was 0 already.
    """
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(FLOATS[dtype])
    lost = rounded.isinf() & tensor.isfinite()
    if what.endswith("logits"):
        lost &= tensor > 0
    if lost.any():
        row = int(lost.reshape(len(lost), -1).any(1).nonzero()[0, 0])
        raise SignalError(
            f"example {keys[row][0]!r}: the teacher's {what} reach {tensor[row].abs().max():.4g}, beyond {dtype} "
            f"(largest {torch.finfo(rounded.dtype).max:.4g}). Keep them as bfloat16 or float32."
        )
    return rounded


def check_numbers(tensor: Tensor, what: str, keys: Sequence[Key], impossible: bool = False) -> Tensor:
    """``tensor`` [B, ...], in which every number is finite (or -inf, where the ``impossible`` is allowed).

    For what is quantised before the recording looks at it. Raises SignalError, naming the example.
    """
    bad = tensor.isnan() | (tensor == torch.inf) | ((tensor == -torch.inf) & (not impossible))
    if bad.any():
        row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0, 0])
        raise SignalError(
            f"the teacher's {what} for example {keys[row][0]!r} hold NaN or infinity. Nothing can be learned from "
            "that: check this example, the teacher's weights and its precision."
        )
    return tensor


def over_positions(logits: Dense | Projected, change: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``change(values [n, V], number of the first position)`` by chunks of positions, put together to [..., *]."""
    shape = logits.shape
    flat = logits.map(lambda tensor: tensor.reshape(-1, tensor.shape[-1]))
    step = max(1, CHUNK // logits.vocabulary)
    pieces = []
    for first in range(0, shape.numel(), step):
        piece = flat[first : first + step]
        pieces.append(change(piece.compute() if isinstance(piece, Projected) else piece.values, first))
    return tuple(torch.cat(parts).reshape(*shape, *parts[0].shape[1:]) for parts in zip(*pieces, strict=True))


def log_softmax(values: Tensor) -> Tensor:
    """In float32, or in float64 for float64."""
    return (values if values.dtype == torch.float64 else values.float()).log_softmax(-1)


def decode_logits(rows: Rows, facts: Facts, prefix: str = "") -> Logits | None:
    """The logits among the rows whose names start with ``prefix``; draws have no rest, which becomes -inf."""
    if (values := rows.get(f"{prefix}logits.values")) is not None:
        return Dense(widened(values))
    if (ids := rows.get(f"{prefix}logits.ids")) is None:
        return None
    log_probs = widened(rows[f"{prefix}logits.log_probs"])
    rest = rows.get(f"{prefix}logits.rest")
    rest = torch.full(ids.shape[:-1], -torch.inf) if rest is None else widened(rest)
    return Sparse(ids.to(torch.int64), log_probs, rest, **facts[f"{prefix}logits"])


def sparse_of(rows: Sequence[Entries], bits: int, width: int, shape: Sequence[int], vocabulary: int) -> Sparse:
    """The entries of B examples as Sparse logits with ids [B, *shape, width]."""
    ids, log_probs, rest = from_entries(join(rows), bits, width)
    whole = (len(rows), *shape)
    return Sparse(ids.view(*whole, width), log_probs.view(*whole, width), rest.view(whole), vocabulary)


def decode_all(rows: Rows, facts: Facts, prefix: str = "") -> Signal:
    """The Signal that rows under their standard names hold, parts included."""
    mark, parts = f"{prefix}features/", f"{prefix}parts/"
    values = rows.get(f"{prefix}values")
    names = dict.fromkeys(name[len(parts) :].partition("/")[0] for name in rows if name.startswith(parts))
    return Signal(
        logits=decode_logits(rows, facts, prefix),
        values=None if values is None else widened(values),
        features={name[len(mark) :]: widened(rows[name]) for name in rows if name.startswith(mark)},
        parts={unquote(name): decode_all(rows, facts, f"{parts}{name}/") for name in names},
    )


def widened(tensor: Tensor) -> Tensor:
    """Floats as float32; whole numbers and bools as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor

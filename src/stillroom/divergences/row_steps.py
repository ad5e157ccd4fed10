"""The row maths of one chunk of logits: values and their gradient, compiled where that is wanted and works."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Callable[..., Tensor]  # (logits [n, V], *arguments) -> [n]; hashable, and equal when it computes the same

_CACHED = 2**19  # logits that stay in a core's cache through the passes of the row maths
_log = logging.getLogger(__name__)
_compile_failed: list[str] = []  # once it failed it is not tried again in this process


@dataclass(frozen=True)
class Step:
    """The row maths of one chunk; frozen, so that what is compiled for it is found again."""

    rows: Rows
    scale: float
    softcap: float | None
    gradient: bool

    def __call__(self, raw: Tensor, *arguments: Tensor) -> Tensor:
        """The values [n] of raw logits [n, V]; with ``gradient``, raw then holds the gradient of their sum."""
        if not self.gradient:
            return self._values(raw, *arguments)
        gradient, (_, values) = torch.func.grad_and_value(self._total, has_aux=True)(raw, *arguments)
        raw.copy_(gradient)  # in place: a chunk's logits are not needed again, and their memory is
        return values

    def _total(self, raw: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        values = self._values(raw, *arguments)
        return values.sum(), values

    def _values(self, raw: Tensor, *arguments: Tensor) -> Tensor:
        return self.rows(finish(raw.to(wide(raw.dtype)), self.scale, self.softcap), *arguments)


def run(step: Step, logits: Tensor, arguments: tuple[Tensor, ...], compiled: bool) -> Tensor:
    """The step on one chunk [n, V], by blocks of positions that stay in the processor's cache."""
    block = len(logits)
    if logits.device.type == "cpu":
        block = max(2, _CACHED // logits.shape[-1])
    values = []
    for start in range(0, len(logits), block):
        part = slice(start, start + block)
        values.append(_run_block(step, logits[part], tuple(a[part] if a.dim() else a for a in arguments), compiled))
    return torch.cat(values)


def _run_block(step: Step, logits: Tensor, arguments: tuple[Tensor, ...], compiled: bool) -> Tensor:
    """Compiled if it is wanted and works, else eager: the same function either way."""
    if compiled and len(logits) > 1 and not _compile_failed:
        for tensor in (logits, *arguments):
            if tensor.dim() > 0:  # so that the next number of positions does not compile again
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return _compiled(step)(logits, *arguments)
        except Exception as error:  # no compiler, no disk, an operation it lacks: slower is better than stopped
            _compile_failed.append(f"{type(error).__name__}: {error}")
            _log.warning("torch.compile does not work here, running eagerly instead: %s", _compile_failed[0])
    return step(logits, *arguments)


@functools.lru_cache(maxsize=64)
def _compiled(step: Step) -> Callable[..., Tensor]:
    def chunk_rows(raw: Tensor, *arguments: Tensor) -> Tensor:
        return step(raw, *arguments)

    # a code of its own: what is compiled is counted by code, and after 8 of them no more is
    chunk_rows.__code__ = chunk_rows.__code__.replace()
    return torch.compile(chunk_rows)


def finish(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits from hidden @ weight.T + bias; the last part of Projected.compute."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of values and sums: float32 at least."""
    return torch.promote_types(dtype, torch.float32)

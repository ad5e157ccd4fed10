"""Logits that are never all there: head x row function by chunks of positions. Knows no divergence and no mask.

A row function maps the logits of some positions, and the teacher's columns there, to one value per position. Chunk by
chunk, forward computes logits, values, the gradient to the logits, and from it the gradients to hidden states and head:
three matmuls with the student's head, not four, and memory that does not grow with positions x vocabulary.
``Arithmetic`` says what may be spent less than exactly.

Environment: STILLROOM_COMPILE=0 runs the row functions eagerly; STILLROOM_CHUNK_MIB sets the size of a chunk's logits.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.divergences.matmuls import (
    LogitsOf,
    add_weight_gradient,
    dtype_of,
    hidden_gradient,
    in_dtype,
    sample_columns,
)
from stillroom.divergences.row_steps import Rows, Step, finish, run, wide
from stillroom.errors import ShapeError, UsageError
from stillroom.types import Projected

_CHUNK_MIB = {"cpu": 64.0}  # of one side's logits; smaller chunks pass over the head's gradient too often
_CHUNK_MIB_ELSEWHERE = 256.0  # an accelerator needs more positions to be busy
_SAMPLED = 0.4  # of that where columns are sampled
_FEWEST = 64  # positions of a chunk: with fewer, reading the head from memory takes longer than multiplying by it
_COMPILE_FROM = 2**24  # logits in all; below, compiling takes longer than it saves


@dataclass(frozen=True)
class Arithmetic:
    """How the products with a head are computed; by default exactly, in the precision of the tensors and of autocast.

    ``matmul="bf16"``: in bfloat16, whatever the tensors are; sums, values and the gradients of float32 tensors stay
    float32, and a float32 head has one bfloat16 copy that is kept. Logits are rounded to 8 bits: by up to 0.06 at 20.
    ``keep_columns``: backward multiplies only some of the vocabulary's columns: one whose largest |gradient| in a chunk
    of positions is below this threshold is kept with probability |gradient| / threshold, and scaled up by that. Values
    stay exact, gradients unbiased, and exact where more than half would be kept (a young student, whose probabilities
    are spread wide). 0.003 is a good start; a smaller one costs more and errs less. The draws are torch's, so
    torch.manual_seed repeats them; how a batch is split into chunks changes them.
    Raises UsageError for a setting out of range.
    """

    matmul: Literal["auto", "bf16"] = "auto"
    keep_columns: float | None = None

    def __post_init__(self) -> None:
        if self.matmul not in ("auto", "bf16"):
            raise UsageError(f"matmul={self.matmul!r} is unknown: choose 'auto' or 'bf16'.")
        if self.keep_columns is not None and not 0 < self.keep_columns < math.inf:
            raise UsageError(f"keep_columns={self.keep_columns} cannot be used: choose a number above 0, or None.")


EXACT = Arithmetic()


def by_chunks(
    student: Projected,
    rows: Rows,
    columns: tuple[Tensor, ...] = (),
    teacher: Projected | None = None,
    *,
    arithmetic: Arithmetic = EXACT,
    chunk: int | None = None,
    compiled: bool | None = None,
) -> Tensor:
    """The values [...] of ``rows`` at every position of the student; float32 at least.

    Called as rows(logits [n, V], *constants, [the teacher's logits [n, V], where it is Projected,] *columns [n, *]);
    ``columns`` of no dimension are the constants. Gradients go to the student's hidden states, weight and bias, where
    these ask for one; never to the teacher or the columns. They are exact whatever gradient arrives, and cheapest when
    it is the same number at every position. Not differentiable twice. ``arithmetic`` may make them cheaper than exact.

    ``chunk``: positions at a time, None = by memory. ``compiled``: None = where it pays and STILLROOM_COMPILE is not 0.
    """
    count, width = math.prod(student.shape), student.hidden.shape[-1]
    if student.weight.shape[-1] != width:
        raise ShapeError(f"hidden {list(student.hidden.shape)} does not fit the head {list(student.weight.shape)}.")
    if compiled is None:
        compiled = count * student.vocabulary >= _COMPILE_FROM and os.environ.get("STILLROOM_COMPILE", "1") != "0"
    dtype = torch.bfloat16 if arithmetic.matmul == "bf16" else dtype_of(student)
    plan = _Plan(
        rows=rows,
        size=_chunk_size(count, student, chunk, dtype, arithmetic.keep_columns is not None),
        compiled=compiled,
        dtype=dtype,
        threshold=arithmetic.keep_columns,
        scale=student.scale,
        softcap=student.softcap,
        constants=tuple(c.to(student.hidden.device) for c in columns if c.dim() == 0),
        columns=tuple(c.detach().reshape(count, *c.shape[len(student.shape) :]) for c in columns if c.dim() > 0),
        teacher=teacher,
    )
    hidden = student.hidden.reshape(count, width)
    if torch.is_grad_enabled():
        values = _ByChunks.apply(hidden, student.weight, student.bias, plan)
    else:
        values = plan.sweep(hidden, student.weight, student.bias).values
    return values.reshape(student.shape)  # type: ignore[union-attr]


@dataclass(eq=False)
class _Found:
    """What a sweep over the positions gives; None where it was not asked for."""

    values: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything about an evaluation but the tensors that get gradients."""

    rows: Rows
    size: int
    compiled: bool
    dtype: torch.dtype  # of the matmuls
    threshold: float | None  # of the columns that backward multiplies
    scale: float
    softcap: float | None
    constants: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    teacher: Projected | None

    def sweep(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, ...] = (False, False, False),
        weights: Tensor | None = None,
    ) -> _Found:
        """Values [N], and the gradients that are needed of their sum, weighted by ``weights`` [N]."""
        full, precision = wide(self.dtype), (hidden.dtype, weight.dtype)
        hidden, weight = hidden.detach().to(self.dtype), in_dtype(weight, self.dtype)
        bias = None if bias is None else bias.detach().to(self.dtype)
        threshold = self.threshold if any(needs[:2]) else None
        # the first chunk writes, the others add; if it is the only one there is no sum that needs float32
        make = torch.empty_like if len(hidden) and threshold is None else torch.zeros_like
        found = _Found(
            values=hidden.new_empty(len(hidden), dtype=full),
            hidden=torch.empty_like(hidden, dtype=precision[0]) if needs[0] else None,
            weight=make(weight, dtype=precision[1] if len(hidden) <= self.size else full) if needs[1] else None,
            bias=torch.zeros_like(bias, dtype=full) if bias is not None and needs[2] else None,
        )
        step = Step(self.rows, self.scale, self.softcap, any(needs))
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for part, gradient, arguments in self._pieces(hidden, weight, bias):
                found.values[part] = run(step, gradient, arguments, self.compiled)
                if weights is not None:
                    gradient.mul_(weights[part].unsqueeze(-1))
                if found.bias is not None:
                    found.bias += gradient.sum(0, dtype=full)
                ids = None
                if threshold is not None:
                    gradient, ids = sample_columns(gradient, threshold)
                if found.hidden is not None:
                    found.hidden[part] = hidden_gradient(gradient, weight, ids)
                if found.weight is not None:
                    fresh = part.start == 0 and threshold is None
                    add_weight_gradient(found.weight, gradient, hidden[part], ids, fresh)
        return found

    def _pieces(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, tuple[Tensor, ...]]]:
        """Chunk by chunk: which positions, their raw logits [n, V], the other arguments of the row function."""
        logits = LogitsOf(weight, bias, self.size)
        ask = None if self.teacher is None else self._teacher_by_chunks(self.teacher, len(hidden))
        for start in range(0, len(hidden), self.size):
            part = slice(start, start + self.size)
            said = () if ask is None else (ask(part),)
            yield part, logits(hidden[part]), (*self.constants, *said, *(c[part] for c in self.columns))

    def _teacher_by_chunks(self, teacher: Projected, count: int) -> Callable[[slice], Tensor]:
        dtype = self.dtype if self.dtype == torch.bfloat16 else dtype_of(teacher)
        hidden = teacher.hidden.detach().reshape(count, teacher.hidden.shape[-1]).to(dtype)
        bias = None if teacher.bias is None else teacher.bias.detach().to(dtype)
        logits = LogitsOf(in_dtype(teacher.weight, dtype), bias, self.size)
        return lambda part: finish(logits(hidden[part]), teacher.scale, teacher.softcap)


class _ByChunks(torch.autograd.Function):
    """Gradients come out of the forward pass, on the assumption that every position will weigh the same."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        found = plan.sweep(hidden, weight, bias, ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias)
        ctx.plan = plan
        ctx.found = dataclasses.replace(found, values=found.values.new_empty(0))  # an output kept here would be a cycle
        return found.values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias = ctx.saved_tensors
        # given away, not copied: the optimiser may change them, so a second backward finds them anew
        found, ctx.found = ctx.found, None
        needs = ctx.needs_input_grad[:3]
        common = None if found is None else _common(gradient)
        if found is None:
            found = ctx.plan.sweep(hidden, weight, bias, needs, gradient)
        elif common is not None:
            for each in (found.hidden, found.weight, found.bias):
                if each is not None:
                    each.mul_(common)
        else:  # positions weigh differently: a position's own gradient scales, a sum over positions does not
            if found.hidden is not None:
                found.hidden.mul_(gradient.unsqueeze(-1))
            if needs[1] or needs[2]:
                found.weight = None  # its memory is needed now
                summed = ctx.plan.sweep(hidden, weight, bias, (False, *needs[1:]), gradient)
                found.weight, found.bias = summed.weight, summed.bias
        return (
            None if found.hidden is None else found.hidden.to(hidden.dtype),
            None if found.weight is None else found.weight.to(weight.dtype),
            None if found.bias is None else found.bias.to(bias.dtype),
            None,
        )


def _common(gradient: Tensor) -> Tensor | None:
    """The number that the gradient is at every position, or None."""
    if gradient.numel() == 0:
        return gradient.new_ones(())
    first = gradient.reshape(-1)[0]
    alike = not any(gradient.stride()) or bool((gradient == first).all())
    return first if alike else None


def _chunk_size(count: int, student: Projected, chunk: int | None, dtype: torch.dtype, sampled: bool) -> int:
    """Positions per chunk: as many as fit, spread evenly, so that no small chunk is left at the end."""
    if chunk is None:
        default = _CHUNK_MIB.get(student.hidden.device.type, _CHUNK_MIB_ELSEWHERE)
        room = float(os.environ.get("STILLROOM_CHUNK_MIB", default)) * 2**20
        if sampled:  # the fewer positions share their columns, the fewer columns each needs
            room *= _SAMPLED
        chunk = max(_FEWEST, int(room / (dtype.itemsize * student.vocabulary)))
        # a low-precision head adds the gradients of several chunks in float32: one chunk may take less memory
        adds = student.weight.requires_grad and student.weight.dtype.itemsize < 4
        if adds and dtype.itemsize * count <= 2 * student.weight.shape[-1]:
            chunk = max(1, count)
    if chunk < 1:
        raise UsageError(f"chunk={chunk} cannot be used: choose at least 1 position.")
    chunks = max(1, math.ceil(count / chunk))
    return max(1, math.ceil(count / chunks))

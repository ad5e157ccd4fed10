"""Logits that are never all there: head x row function by chunks of positions. Knows no divergence and no mask.

A row function maps the logits of some positions, and the teacher's columns there, to one value per position. Chunk by
chunk, forward computes logits, values, the gradient to the logits, and from it the gradients to hidden states and head:
three matmuls with the student's head, not four, and memory that does not grow with positions x vocabulary.

Environment: STILLROOM_COMPILE=0 runs the row functions eagerly; STILLROOM_CHUNK_MIB sets the size of a chunk's logits.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import ShapeError, UsageError
from stillroom.row_steps import Rows, Step, finish, run, wide
from stillroom.types import Projected

_CHUNK_MIB = {"cpu": 64.0}  # of float32 logits; smaller chunks pass over the head's gradient too often
_CHUNK_MIB_ELSEWHERE = 256.0  # an accelerator needs more positions to be busy
_FEWEST = 64  # positions of a chunk: with fewer, reading the head from memory takes longer than multiplying by it
_COMPILE_FROM = 2**24  # logits in all; below, compiling takes longer than it saves
_BLOCK = 2**22  # numbers of a low-precision weight gradient held at once, before they are added in float32


def by_chunks(
    student: Projected,
    rows: Rows,
    columns: tuple[Tensor, ...] = (),
    teacher: Projected | None = None,
    *,
    chunk: int | None = None,
    compiled: bool | None = None,
) -> Tensor:
    """The values [...] of ``rows`` at every position of the student; float32 at least.

    Called as rows(logits [n, V], *constants, [the teacher's logits [n, V], where it is Projected,] *columns [n, *]);
    ``columns`` of no dimension are the constants. Gradients go to the student's hidden states, weight and bias, where
    these ask for one; never to the teacher or the columns. They are exact whatever gradient arrives, and cheapest when
    it is the same number at every position. Not differentiable twice.

    ``chunk``: positions at a time, None = by memory. ``compiled``: None = where it pays and STILLROOM_COMPILE is not 0.
    """
    count, width = math.prod(student.shape), student.hidden.shape[-1]
    if student.weight.shape[-1] != width:
        raise ShapeError(f"hidden {list(student.hidden.shape)} does not fit the head {list(student.weight.shape)}.")
    if compiled is None:
        compiled = count * student.vocabulary >= _COMPILE_FROM and os.environ.get("STILLROOM_COMPILE", "1") != "0"
    plan = _Plan(
        rows=rows,
        size=_chunk_size(count, student, chunk),
        compiled=compiled,
        dtype=_dtype_of(student),
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
        full = wide(self.dtype)
        hidden, weight = hidden.detach().to(self.dtype), weight.detach().to(self.dtype)
        bias = None if bias is None else bias.detach().to(self.dtype)
        make = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk writes, the others add
        found = _Found(
            values=hidden.new_empty(len(hidden), dtype=full),
            hidden=torch.empty_like(hidden) if needs[0] else None,
            weight=make(weight, dtype=full) if needs[1] else None,
            bias=torch.zeros_like(bias, dtype=full) if bias is not None and needs[2] else None,
        )
        step = Step(self.rows, self.scale, self.softcap, any(needs))
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for part, logits, arguments in self._pieces(hidden, weight, bias):
                found.values[part] = run(step, logits, arguments, self.compiled)
                if weights is not None:
                    logits.mul_(weights[part].unsqueeze(-1))
                if found.hidden is not None:
                    torch.mm(logits, weight, out=found.hidden[part])
                if found.weight is not None:
                    _add_product(found.weight, logits, hidden[part], fresh=part.start == 0)
                if found.bias is not None:
                    found.bias += logits.sum(0, dtype=full)
        return found

    def _pieces(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, tuple[Tensor, ...]]]:
        """Chunk by chunk: which positions, their raw logits [n, V], the other arguments of the row function."""
        logits = _Product(weight, bias, self.size)
        ask = None if self.teacher is None else _teacher_by_chunks(self.teacher, len(hidden), self.size)
        for start in range(0, len(hidden), self.size):
            part = slice(start, start + self.size)
            said = () if ask is None else (ask(part),)
            yield part, logits(hidden[part]), (*self.constants, *said, *(c[part] for c in self.columns))


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


class _Product:
    """hidden @ weight.T + bias into one buffer that is used again: fresh pages cost time on every chunk."""

    def __init__(self, weight: Tensor, bias: Tensor | None, size: int) -> None:
        self.weight, self.bias = weight.t(), bias
        self.buffer = weight.new_empty(size, len(weight))

    def __call__(self, hidden: Tensor) -> Tensor:
        out = self.buffer[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight, out=out)
        return torch.addmm(self.bias, hidden, self.weight, out=out)


def _teacher_by_chunks(teacher: Projected, count: int, size: int) -> Callable[[slice], Tensor]:
    dtype = _dtype_of(teacher)
    hidden = teacher.hidden.detach().reshape(count, -1).to(dtype)
    bias = None if teacher.bias is None else teacher.bias.detach().to(dtype)
    product = _Product(teacher.weight.detach().to(dtype), bias, size)
    return lambda part: finish(product(hidden[part]), teacher.scale, teacher.softcap)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, fresh: bool) -> None:
    """Add gradient [n, V].T @ hidden [n, D] to total [V, D], or write it if ``fresh``.

    A low-precision product is added in float32, by blocks of V: there is no such matmul on every device.
    """
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden, beta=0 if fresh else 1)
        return
    block = max(1, _BLOCK // total.shape[-1])
    for start in range(0, len(total), block):
        part = slice(start, start + block)
        product = gradient[:, part].t() @ hidden
        total[part] = product if fresh else total[part] + product


def _dtype_of(head: Projected) -> torch.dtype:
    """What its matmul runs in: as torch.nn.functional.linear would, autocast included."""
    dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
    device = head.hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _chunk_size(count: int, student: Projected, chunk: int | None) -> int:
    """Positions per chunk: as many as fit, spread evenly, so that no small chunk is left at the end."""
    if chunk is None:
        default = _CHUNK_MIB.get(student.hidden.device.type, _CHUNK_MIB_ELSEWHERE)
        room = float(os.environ.get("STILLROOM_CHUNK_MIB", default)) * 2**20
        chunk = max(_FEWEST, int(room / (4 * student.vocabulary)))
    if chunk < 1:
        raise UsageError(f"chunk={chunk} cannot be used: choose at least 1 position.")
    chunks = max(1, math.ceil(count / chunk))
    return max(1, math.ceil(count / chunks))

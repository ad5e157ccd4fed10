"""What a student of another tokenizer is asked to match: objectives on paired batches (data.pairs, teachers.across).

``AlignedTargets`` is X-Token, ``UniversalLogits`` is ULD, ``SpanLikelihood`` is GOLD's merging of spans; each counts
the positions where both sides have read the same bytes, and only those.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from stillroom.divergences import forward_kl, projection
from stillroom.errors import DataError, SignalError
from stillroom.objectives.matching import Divergence, SoftTargets, counted_positions, where_counted
from stillroom.types import Batch, Dense, Logits, Projected, Signal, Sparse

_NEVER = -1e30  # the log of a probability of 0 whose gradient is a number


def aligned_positions(batch: Batch) -> Tensor:
    """The positions [B, T] bool that count and where the teacher has an answer after the same bytes."""
    return counted_positions(batch) & (_column(batch, "teacher_index") >= 0)


@dataclass(frozen=True)
class AlignedTargets:
    """SoftTargets at the aligned positions, on the teacher's answer carried to the student's ids (``across``).

    X-Token, arXiv 2605.21699, with the projection on the teacher's side. Term: ``aligned_targets`` [B, T], nats.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self._targets()

    def _targets(self) -> SoftTargets:
        return SoftTargets(self.divergence, self.temperature)

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        there = dataclasses.replace(batch, mask=aligned_positions(batch))
        (values,) = self._targets()(student, teacher, there).values()
        return {"aligned_targets": values}

    def counted(self, batch: Batch) -> Mapping[str, Tensor]:
        """The aligned positions [B, T]."""
        return {"aligned_targets": aligned_positions(batch)}


@dataclass(frozen=True)
class UniversalLogits:
    """The student's probabilities, sorted, match the teacher's, sorted: sum_i |p_(i) - q_(i)|, from 0 to 2.

    ULD, Boizard et al. 2024 (arXiv 2402.12030): the Wasserstein-1 distance of the two sets of probabilities; the
    shorter is padded with zeros. It compares how sure both are, not of what: any permutation of ids gives 0. The paper
    compares the n-th positions; here those after the same bytes. A Sparse teacher: its K entries in order, and the
    others as one number. Term: ``universal_logits`` [B, T].
    """

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        ours, theirs = student.need_logits("UniversalLogits"), _own_logits(teacher, "UniversalLogits")
        index = _column(batch, "teacher_index")
        rows = torch.arange(len(batch))[:, None].expand_as(index)

        def compute(where: Tensor | slice) -> Tensor:
            return _compare_sorted(ours[where], theirs[(rows[where], index[where])])

        return {"universal_logits": where_counted(aligned_positions(batch), compute)}

    def counted(self, batch: Batch) -> Mapping[str, Tensor]:
        """The aligned positions [B, T]."""
        return {"universal_logits": aligned_positions(batch)}


@dataclass(frozen=True)
class SpanLikelihood:
    """The student finds a span of bytes as likely as the teacher does: P log(P/Q) + (1-P) log((1-P)/(1-Q)), nats.

    P and Q are the products of the probabilities of the span's tokens on each side, the merging of GOLD (Patiño et al.
    2025, in TRL); here for the span as written and its complement, the binarised divergence of Minixhofer et al. 2025
    (ALM, arXiv 2503.20083). Every token of both sides is in one span. A Sparse teacher: a token outside its K entries
    has the tail's mean. Term: ``span_likelihood`` [B, T], at the first position of each span.
    """

    needs_labels: ClassVar[bool] = True

    def __call__(self, student: Signal, teacher: Signal, batch: Batch) -> Mapping[str, Tensor]:
        if batch.labels is None:
            raise DataError("SpanLikelihood needs labels, and the examples have none. Choose AlignedTargets.")
        ours, theirs = student.need_logits("SpanLikelihood"), _own_logits(teacher, "SpanLikelihood")
        span, teacher_span = _column(batch, "span"), _column(batch, "teacher_span")
        count = int(max(span.max(), teacher_span.max())) + 1
        known = counted_positions(batch)
        labels, teacher_labels = batch.labels, _column(batch, "teacher_labels")
        odds = where_counted(known, lambda where: _log_odds_of(ours[where], labels[where]))
        log_q, log_not_q = _of_spans(odds, span.to(odds.device), count)
        with torch.no_grad():
            said = teacher_span >= 0
            their_odds = where_counted(said, lambda where: _log_odds_of(theirs[where], teacher_labels[where]))
            log_p, log_not_p = (
                each.to(odds) for each in _of_spans(their_odds, teacher_span.to(their_odds.device), count)
            )
        values = _excess(log_p, log_q) + _excess(log_not_p, log_not_q)
        values = values.gather(1, span.clamp(min=0).to(odds.device))
        return {"span_likelihood": values.masked_fill(~self._begun(batch).to(odds.device), 0)}

    def counted(self, batch: Batch) -> Mapping[str, Tensor]:
        """The first positions [B, T] of the spans of which every position counts."""
        return {"span_likelihood": self._begun(batch)}

    @staticmethod
    def _begun(batch: Batch) -> Tensor:
        span, known = _column(batch, "span"), counted_positions(batch)
        lacking = torch.zeros(len(span), int(span.max()) + 2, dtype=torch.int64)
        lacking.scatter_add_(1, span + 1, (~known).long())
        return aligned_positions(batch) & (lacking.gather(1, span + 1) == 0)


def _column(batch: Batch, name: str) -> Tensor:
    if name not in batch.inputs:
        raise DataError(f"the batch has no {name!r}: its rows are not paired. Use stillroom.data.pair(texts, ...).")
    return cast(Tensor, batch.inputs[name])


def _own_logits(teacher: Signal, who: str) -> Logits:
    """What the teacher said at its own positions [B, U], in its own ids."""
    if "teacher" not in teacher.parts:
        raise SignalError(
            f"{who} needs the teacher's own answer in parts['teacher'], but the teacher gives {list(teacher.given)}. "
            "Use stillroom.teachers.across.across(teacher, the student's tokenizer) on paired rows."
        )
    logits = teacher.parts["teacher"].need_logits(who)
    if isinstance(logits, Sparse) and logits.sampled:
        raise SignalError(f"{who} needs the teacher's probabilities, and these are random draws. Record with TopK.")
    return logits


def _rowwise(student: Logits, rows: Callable[..., Tensor], columns: tuple[Tensor, ...], teacher: Any = None) -> Tensor:
    """Rows of the student's logits [n, V], and of the teacher's where it is Projected, whole or by chunks."""
    if isinstance(student, Projected):
        return projection.by_chunks(student, rows, columns, teacher, compiled=False)
    if isinstance(student, Sparse):
        raise SignalError("the student's logits are Sparse. Let the student give Dense or Projected logits.")
    said = () if teacher is None else (teacher.compute().detach(),)
    return rows(student.values, *said, *columns)


def _compare_sorted(student: Logits, teacher: Logits) -> Tensor:
    if isinstance(teacher, Projected):
        return _rowwise(student, _sorted_distance, (), teacher)
    if isinstance(teacher, Sparse):
        columns = (teacher.log_probs.detach().float().exp(), teacher.rest.detach().float().exp())
        return _rowwise(student, _kept_distance, columns)
    return _rowwise(student, _sorted_distance, (cast(Dense, teacher).values.detach(),))


def _sorted_distance(logits: Tensor, teacher: Tensor) -> Tensor:
    """The sum over places of |p_(i) - q_(i)|, from logits [n, V] and the teacher's [n, U]."""
    ours, theirs = (_softmax(each).sort(dim=-1, descending=True).values for each in (logits, teacher))
    size = max(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (pad(each, (0, size - each.shape[-1])) for each in (ours, theirs))
    return (ours - theirs.to(ours)).abs().sum(-1)


def _kept_distance(logits: Tensor, kept: Tensor, tail: Tensor) -> Tensor:
    """The same for K probabilities of the teacher [n, K], and the mass of the others [n]."""
    mass = _softmax(logits)
    top, ids = mass.topk(min(kept.shape[-1], mass.shape[-1]), dim=-1)
    others = mass.scatter(-1, ids, 0.0).sum(-1)
    top = pad(top, (0, kept.shape[-1] - top.shape[-1]))
    in_order = kept.to(top).sort(dim=-1, descending=True).values
    return (top - in_order).abs().sum(-1) + (others - tail.to(top)).abs()


def _softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def _log_odds_of(logits: Logits, labels: Tensor) -> Tensor:
    """The log of p(label) / (1 - p(label)) at each position [n]; no digit is lost near 0 or 1."""
    if isinstance(logits, Sparse):
        return _kept_log_odds(logits, labels.to(logits.ids.device))
    device = logits.hidden.device if isinstance(logits, Projected) else logits.values.device
    return _rowwise(logits, _log_odds, (labels.to(device),))


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = labels.unsqueeze(-1)
    others = logits.scatter(-1, chosen, float("-inf")).logsumexp(-1)
    return logits.gather(-1, chosen).squeeze(-1) - others


def _kept_log_odds(teacher: Sparse, labels: Tensor) -> Tensor:
    """From K entries and a tail whose ids share its mass evenly."""
    left = max(1, teacher.vocabulary - teacher.ids.shape[-1])
    log_probs, rest = teacher.log_probs.float(), teacher.rest.float()
    hit = teacher.ids == labels.unsqueeze(-1)
    found = hit.any(-1)
    inside = log_probs.masked_fill(~hit, float("-inf")).amax(-1)
    chosen = torch.where(found, inside, rest - math.log(left))
    tail = torch.where(found, rest, rest + math.log1p(-1 / left) if left > 1 else torch.full_like(rest, _NEVER))
    others = torch.cat([log_probs.masked_fill(hit, float("-inf")), tail.unsqueeze(-1)], -1).logsumexp(-1)
    return (chosen - others).clamp(_NEVER, -_NEVER)


def _of_spans(log_odds: Tensor, span: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log of the probability of each span [B, S], the product of its tokens', and log of 1 less it.

    1 - p1 p2 p3 = (1 - p1) + p1 (1 - p2) + p1 p2 (1 - p3): a sum of positive terms, so that a span that is almost
    certain keeps its digits.
    """
    here = torch.arange(span.shape[1], device=span.device).expand_as(span)
    starts = torch.ones_like(span, dtype=torch.bool)
    starts[:, 1:] = span[:, 1:] != span[:, :-1]
    place = here - (here * starts).cummax(-1).values
    place = place.masked_fill(span < 0, 0)
    longest = int(place.max()) + 1
    slot = torch.where(span >= 0, span * longest + place, count * longest)  # one slot more for positions of no span

    def table(values: Tensor, empty: float) -> Tensor:
        filled = values.new_full((len(span), count * longest + 1), empty).scatter(1, slot, values)
        return filled[:, :-1].reshape(len(span), count, longest)

    inside, outside = table(logsigmoid(log_odds), 0.0), table(logsigmoid(-log_odds), _NEVER)
    before = pad(inside.cumsum(-1)[..., :-1], (1, 0))
    return inside.sum(-1), (before + outside).logsumexp(-1)


def _excess(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The product p (log p - log q), 0 where p is 0."""
    p = log_p.exp()
    return p * torch.where(p > 0, log_p - log_q, 0.0)

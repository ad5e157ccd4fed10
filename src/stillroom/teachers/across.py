"""A teacher of another tokenizer, answering at the student's positions in the student's ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from stillroom.digests import json_digest
from stillroom.errors import DataError, PairError, ShapeError, SignalError, UsageError
from stillroom.language import byte_lengths, tokenizer_digest
from stillroom.language.vocabularies import VocabularyMap, map_between
from stillroom.types import Batch, Dense, Examples, Identity, Logits, Model, Projected, Signal, Sparse, identity_of

CHUNK_MIB = 64  # of float32 probabilities over the larger vocabulary, at once
NEEDED = ("teacher_tokens", "teacher_positions", "teacher_index")


@dataclass(frozen=True, eq=False)
class AcrossTokenizers:
    """See ``across``. Its identity carries the student's tokenizer, which its logits are in; the teacher is a part.

    The answer to a paired batch (data.pairs): ``logits`` [B, T] over the student's ids where ``teacher_index`` is not
    -1, and uniform elsewhere (these positions do not count); ``parts["teacher"]``: what the teacher itself said, at its
    own positions [B, U] in its own ids.
    """

    teacher: Model
    vocabulary_map: VocabularyMap | None
    keep: int | None
    lengths: tuple[Tensor, Tensor]  # bytes of each id: the teacher's, the student's
    lead: int  # bytes that the teacher's tokenizer puts before a text, less the student's
    identity: Identity

    @property
    def views(self) -> tuple[int, ...] | None:
        return getattr(self.teacher, "views", None)

    def check_data(self, examples: Examples) -> None:
        """Raises PairError for rows that are not paired, are of other tokenizers, or were not recorded."""
        theirs = getattr(examples, "teacher", None)
        if theirs is None:
            raise PairError(
                "these examples are not paired. Make them with stillroom.data.pair(texts, student, teacher)."
            )
        found = {"student": examples.tokenizer, "teacher": theirs.tokenizer}  # type: ignore[attr-defined]
        wanted = {"student": self.identity.tokenizer, "teacher": self.identity.parts[0].tokenizer}
        for whose, digest in wanted.items():
            if digest is not None and digest != found[whose]:
                raise PairError(
                    f"the {whose} side of the paired rows is of tokenizer {found[whose]}, but the {whose} here of "
                    f"{digest}. Pair the texts again with these tokenizers."
                )
        if hasattr(self.teacher, "check_data"):
            self.teacher.check_data(theirs)  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        said, logits, index = self._ask(batch)
        carried = None if self.vocabulary_map is None else self._carried(logits, index)
        return Signal(logits=carried, parts={"teacher": said})

    @torch.no_grad()
    def exact_mass(self, batch: Batch) -> Tensor:
        """The share of the teacher's mass on ids that the student has too, at each aligned position [n]."""
        _, logits, index = self._ask(batch)
        exact = self._map().exact
        return torch.cat([torch.zeros(0), *(_on(logits[part], exact) for part in _aligned(index, len(exact)))])

    def _ask(self, batch: Batch) -> tuple[Signal, Logits, Tensor]:
        """What the teacher says at its own positions, its logits, and the index of the student's positions in it."""
        tokens, starts, index = (_column(batch, name) for name in NEEDED)
        self._refuse_misaligned(batch, tokens, index)
        said = self.teacher(Batch(batch.ids, {"tokens": tokens, "positions": starts}, views=batch.views))
        logits = said.need_logits("a teacher across tokenizers")
        if logits.shape != tokens.shape:
            raise ShapeError(f"the teacher answers at {list(logits.shape)}, but its tokens are {list(tokens.shape)}.")
        return said, logits, index

    def _map(self) -> VocabularyMap:
        if self.vocabulary_map is None:
            raise UsageError("this teacher was made without a map between the vocabularies (project=False).")
        return self.vocabulary_map

    def _carried(self, logits: Logits, index: Tensor) -> Logits:
        mapped = self._map()
        mapped.check_width(logits.vocabulary)
        if isinstance(logits, Sparse) and (logits.sampled or self.keep is None):
            what = "are random draws" if logits.sampled else "are sparse, and keep=None asks for all ids"
            raise SignalError(f"the teacher's answers {what}. Record it with TopK, and give keep=64 or so.")
        spread = mapped.size if isinstance(logits, Sparse) else max(logits.vocabulary, mapped.size)
        pieces = [self._chunk(logits, part) for part in _aligned(index, spread)]
        here = index >= 0
        device = pieces[0][-1].device if pieces else index.device
        if self.keep is None:
            filled = torch.zeros(*index.shape, mapped.size, device=device)  # the softmax of zeros is uniform
            return Dense(_put(filled, here, [values for (values,) in pieces]))
        width = self.keep
        ids = torch.arange(width, device=device).expand(*index.shape, width).clone()
        log_probs = torch.full((*index.shape, width), -torch.tensor(float(mapped.size)).log().item(), device=device)
        rest = torch.tensor(1 - width / mapped.size, device=device).log().expand(index.shape).clone()
        columns = list(zip(*pieces, strict=True)) if pieces else [[], [], []]
        filled = (_put(each, here, found) for each, found in zip((ids, log_probs, rest), columns, strict=True))
        return Sparse(*filled, vocabulary=mapped.size)

    def _chunk(self, logits: Logits, part: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """What is kept of some positions: (log-probabilities [n, V],) or (ids [n, K], log-probabilities, rest [n])."""
        mapped, chosen = self._map(), logits[part]
        if isinstance(chosen, Sparse):
            mass, tail = mapped.carry_kept(chosen.ids.long(), chosen.log_probs.float().exp()), chosen.rest.float().exp()
        else:
            mass, tail = mapped.carry(_probabilities(chosen)), 0.0
        if self.keep is None:
            return (mass.log(),)
        kept, ids = mass.topk(self.keep, -1)
        others = mass.scatter(-1, ids, 0.0).sum(-1) + tail  # summed for themselves: 1 - kept would lose their digits
        return ids, kept.log(), others.log()

    def _refuse_misaligned(self, batch: Batch, tokens: Tensor, index: Tensor) -> None:
        """Both sides must have read as many bytes where they are said to be aligned: found out on every batch."""
        theirs = self.lengths[0].to(tokens.device)[tokens].cumsum(-1)
        ours = self.lengths[1].to(tokens.device)[cast(Tensor, batch.inputs["tokens"])].cumsum(-1)
        read = theirs.gather(1, index.clamp(0, tokens.shape[1] - 1))
        wrong = (index >= 0) & ((read != ours) & (read != ours + self.lead) | (index >= tokens.shape[1]))
        if wrong.any():
            row, at = wrong.nonzero()[0].tolist()
            raise PairError(
                f"example {batch.ids[row]!r} is not aligned: after position {at} the student has read "
                f"{int(ours[row, at])} bytes, but the teacher {int(read[row, at])} after its position "
                f"{int(index[row, at])}. Pair the texts again (stillroom.data.pair) with these two tokenizers."
            )


def across(
    teacher: Model,
    student_tokenizer: Any,
    teacher_tokenizer: Any = None,
    *,
    project: bool = True,
    decay: float = 0.0,
    keep: int | None = 64,
    student_size: int | None = None,
) -> AcrossTokenizers:
    """A teacher, live or recorded, for a student of another tokenizer; it answers batches of ``data.pair``.

    ``teacher_tokenizer``: the teacher's own by default; a recording needs it said. ``project``: carry its answers to
    the student's vocabulary (``language.vocabularies.map_between``, with ``decay``), as objectives on ``logits`` need;
    False for those that compare vocabularies otherwise. ``keep``: the K largest probabilities after that and the tail
    as one bucket, None for all [B, T, V]. ``student_size``: V, where the student's head is padded.
    A Sparse teacher's own tail stays in the tail.

    Raises PairError when the tokenizer is not the teacher's, with both digests; UsageError without a tokenizer or for
    a keep that does not fit.
    """
    own = teacher_tokenizer if teacher_tokenizer is not None else getattr(teacher, "tokenizer", None)
    if own is None:
        raise UsageError("the teacher does not carry its tokenizer (a recording does not): give teacher_tokenizer=.")
    inner = identity_of(teacher)
    mapped = map_between(own, student_tokenizer, decay=decay, student_size=student_size) if project else None
    if mapped is None:
        digests = {"teacher": tokenizer_digest(own), "student": tokenizer_digest(student_tokenizer)}
    else:
        digests = {"teacher": mapped.teacher, "student": mapped.student}
    if inner.tokenizer is not None and inner.tokenizer != digests["teacher"]:
        raise PairError(
            f"the teacher {inner.name!r} was trained with tokenizer {inner.tokenizer}, but teacher_tokenizer is "
            f"{digests['teacher']}. Equal sizes do not make them the same: give the teacher's own."
        )
    if keep is not None and (keep < 1 or (mapped is not None and keep >= mapped.size)):
        raise UsageError(f"keep={keep} cannot be used: choose from 1 to below the student's number of ids, or None.")
    settings = {"teacher": inner.digest, "map": mapped.digest if mapped else None, "keep": keep, **digests}
    identity = Identity(
        name=f"{inner.name} across tokenizers",
        digest=json_digest(settings) if inner.digest else None,
        kind="across_tokenizers",
        licence=inner.licence,
        route=inner.route,
        source=inner.source,
        revision=inner.revision,
        tokenizer=digests["student"],
        parts=(inner,),
    )
    lengths = (byte_lengths(own), byte_lengths(student_tokenizer, student_size))
    return AcrossTokenizers(teacher, mapped, keep, lengths, _lead(own) - _lead(student_tokenizer), identity)


def _lead(tokenizer: Any) -> int:
    """The bytes that a tokenizer puts before a text (SentencePiece's dummy space: 1)."""
    return int(byte_lengths(tokenizer)[tokenizer("a", add_special_tokens=False)["input_ids"]].sum()) - 1


def _column(batch: Batch, name: str) -> Tensor:
    if name not in batch.inputs:
        raise DataError(f"the batch has no {name!r}: its rows are not paired. Use stillroom.data.pair(texts, ...).")
    return cast(Tensor, batch.inputs[name])


def _aligned(index: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The aligned positions as (row, teacher's position), by chunks whose probabilities fit."""
    rows, columns = (index >= 0).nonzero(as_tuple=True)
    places = index[rows, columns]
    size = max(1, int(CHUNK_MIB * 2**20 / (4 * width)))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield rows[part], places[part]


def _probabilities(logits: Logits) -> Tensor:
    values = logits.compute() if isinstance(logits, Projected) else cast(Dense, logits).values
    return values.to(torch.promote_types(values.dtype, torch.float32)).softmax(-1)


def _on(said: Logits, chosen: Tensor) -> Tensor:
    """The mass [n] on the chosen ids."""
    if isinstance(said, Sparse):
        return (said.log_probs.exp() * chosen.to(said.ids.device)[said.ids.long()]).sum(-1).cpu()
    probabilities = _probabilities(said)
    return (probabilities @ chosen[: probabilities.shape[-1]].to(probabilities)).cpu()


def _put(into: Tensor, here: Tensor, pieces: Any) -> Tensor:
    """``into`` [B, T, ...] with the pieces, in order, at the positions ``here``."""
    if len(pieces):
        into[here.to(into.device)] = torch.cat(list(pieces)).to(into)
    return into

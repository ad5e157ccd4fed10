"""Prompts out of packed rows, what was written after them back into rows, and what is wrong with a text.

Generation wants prompts whose ends lie together (padding on the left); models of this package want rows that begin at
position 0 (padding on the right). Here is where one becomes the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from stillroom.data.tokens import PADDING, positions_of
from stillroom.errors import DataError
from stillroom.language.writing import Written
from stillroom.types import UNLABELLED, Batch

Prompt = Literal["whole", "answer"] | int


def prompts_of(batch: Batch, prompt: Prompt) -> list[list[int]]:
    """The prompt of each row: the whole row, its first so many tokens, or all before the first learned one ('answer').

    Raises DataError, naming the row, for one that holds several documents, or no learned token for 'answer'.
    """
    if "documents" not in batch.extra or "tokens" not in batch.inputs:
        raise DataError("prompts are packed tokens: make them with stillroom.data.pack(texts, ..., together=False).")
    found = []
    tokens: Tensor = batch.inputs["tokens"]  # type: ignore[assignment]
    for row, name in enumerate(batch.ids):
        held = batch.extra["documents"][row]
        size = int((held != PADDING).sum())
        if size == 0 or bool((held[:size] != held[0]).any()):
            raise DataError(f"row {name!r} is not one document, so no prompt. Pack prompts with together=False.")
        if prompt == "answer":
            learned = [] if batch.mask is None else batch.mask[row].nonzero().flatten().tolist()
            if not learned:
                raise DataError(f"row {name!r} has no token to learn, so no answer begins in it. Pack chats.")
            size = learned[0] + 1
        elif prompt != "whole":
            size = min(size, int(prompt))
        found.append(tokens[row, :size].tolist())
    return found


def rows_of(
    ids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    written: Sequence[Written],
    filler: int,
    lengths: Tensor | None,
) -> Batch:
    """Prompts and what was written after them as packed rows [B, T]: only what was written is a label, and counts if
    it is known how likely it was.

    ``extra``, beside ``documents`` and ``bytes`` (``lengths`` [V]: bytes of each id): ``written`` [B, T] bool, where
    the label was written by the student; ``behaviour`` [B, T], its log-probability when it was drawn (nats, 0
    elsewhere); ``truncated`` and ``degenerate`` [B] bool.
    """
    width = max(len(prompt) + len(text.tokens) for prompt, text in zip(prompts, written, strict=True)) - 1
    shape = (len(prompts), width)
    tokens, labels = torch.full(shape, filler), torch.full(shape, UNLABELLED)
    documents, behaviour = torch.full(shape, PADDING), torch.zeros(shape)
    for row, (prompt, text) in enumerate(zip(prompts, written, strict=True)):
        first, last = len(prompt) - 1, len(prompt) + len(text.tokens) - 1
        tokens[row, :last] = torch.tensor([*prompt, *text.tokens[:-1]])
        labels[row, first:last] = torch.tensor(text.tokens)
        behaviour[row, first:last] = torch.tensor(text.log_probs)
        documents[row, :last] = row
    known, scored = labels != UNLABELLED, ~behaviour.isnan()
    counted = known * (0 if lengths is None else lengths[labels.clamp(min=0)])
    extra = {
        "documents": documents,
        "bytes": counted,
        "written": known,
        "behaviour": behaviour.nan_to_num(0.0),
        "truncated": torch.tensor([not text.ended for text in written]),
        "degenerate": torch.tensor([degenerate(text) for text in written]),
    }
    inputs = {"tokens": tokens, "positions": positions_of(documents)}
    return Batch(tuple(ids), inputs, labels, known & scored, extra=extra)


def degenerate(text: Written) -> bool:
    """Whether a text is empty (an end mark alone) or runs in a circle."""
    return (text.ended and len(text.tokens) == 1) or looping(text.tokens)


def looping(tokens: Sequence[int], longest: int = 16, repeats: int = 4, least: int = 8) -> bool:
    """Whether 1 to ``longest`` tokens come ``repeats`` times in a row, over at least ``least`` tokens in all."""
    for period in range(1, longest + 1):
        needed, run = max((repeats - 1) * period, least - period), 0
        for token, later in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if token == later else 0
            if run >= needed:
                return True
    return False


def counts_of(batches: Sequence[tuple[Batch, float]]) -> dict[str, float]:
    """How much was written, and how much of it is cut or degenerate; what has weight 0 is left out."""
    counts: dict[str, float] = {"texts": 0.0, "tokens": 0.0, "truncated": 0.0, "degenerate": 0.0}
    for batch, weight in batches:
        if weight:
            counts["texts"] += len(batch)
            for name, where in (("tokens", "written"), ("truncated", "truncated"), ("degenerate", "degenerate")):
                counts[name] += float(batch.extra[where].sum())
    return counts


class Tally:
    """Running totals of ``counts_of``; they have a state, as they must survive a killed training."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = counts_of([])

    def add(self, counts: Mapping[str, float]) -> None:
        self.totals = {name: total + counts[name] for name, total in self.totals.items()}

    def note(self) -> str:
        """What a person at the terminal is told."""
        texts = self.totals["texts"]
        if not texts:
            return ""
        cut, loops = (self.totals[name] / texts for name in ("truncated", "degenerate"))
        return f", wrote {texts:.0f} ({cut:.0%} truncated, {loops:.0%} degenerate)"

    def state_dict(self) -> dict[str, float]:
        return dict(self.totals)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.totals = dict(state)

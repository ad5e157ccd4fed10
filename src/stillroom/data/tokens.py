"""Packed tokens: documents laid side by side in rows of one length, with labels that are already the next token.

Knows no tokenizer; ``packing`` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stillroom.errors import DataError
from stillroom.types import UNLABELLED, Batch

PADDING = -1  # the document number of positions that hold nothing


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of tokens, an Examples. Inputs ``tokens`` and ``positions`` int64 [B, T]; positions start at 0 with each
    document, and a model of this package does not attend across such a start.

    ``labels`` [B, T]: the token that follows in the same document, -100 where none does or where it is not learned;
    ``mask``: where there is a label. ``extra``: ``documents`` [B, T] (number of the document, -1 = padding) and
    ``bytes`` [B, T] (UTF-8 bytes of the label).
    """

    tokens: np.ndarray  # [N, T] int32
    labels: np.ndarray  # [N, T] int32
    documents: np.ndarray  # [N, T] int32
    ids: tuple[str, ...]
    byte_lengths: torch.Tensor  # [V] int64
    tokenizer: str  # language.tokenizer_digest
    template: str | None = None  # Chat.digest
    name: str = "texts"
    licence: str = "unknown"
    source: str = "unknown"
    facts: dict[str, Any] = field(default_factory=dict)  # documents, split, padding share
    described: dict[str, Any] | None = None  # digests of all rows, where they were taken when the rows were written

    augmented = False
    classes = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int], views: Sequence[int] | None = None) -> Batch:
        """These rows. Raises DataError for a row that does not exist."""
        rows = np.asarray(list(indices), dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise DataError(f"row {rows.max()} was asked of {len(self)} rows (0 to {len(self) - 1}).")
        labels = torch.from_numpy(self.labels[rows].astype(np.int64))
        documents = torch.from_numpy(self.documents[rows].astype(np.int64))
        known = labels != UNLABELLED
        return Batch(
            ids=tuple(self.ids[row] for row in rows),
            inputs={
                "tokens": torch.from_numpy(self.tokens[rows].astype(np.int64)),
                "positions": positions_of(documents),
            },
            labels=labels,
            mask=known,
            views=None if views is None else tuple(views),
            extra={"documents": documents, "bytes": self.byte_lengths[labels.clamp(min=0)] * known},
        )

    def select(self, indices: Sequence[int]) -> Packed:
        """These rows only, in this order."""
        rows = np.asarray(list(indices), dtype=np.int64)
        chosen = {name: getattr(self, name)[rows] for name in ("tokens", "labels", "documents")}
        return Packed(**{**vars(self), **chosen, "ids": tuple(self.ids[row] for row in rows), "described": None})

    @property
    def counted_tokens(self) -> int:
        """How many tokens are predicted."""
        return int((self.labels != UNLABELLED).sum())


def positions_of(documents: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] within each run of one document number."""
    index = torch.arange(documents.shape[-1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[..., 1:] = documents[..., 1:] != documents[..., :-1]
    return index - (index * starts).cummax(-1).values

"""published_tokens: top log-probabilities of a language model's tokens, as someone captured them, as a teacher.

Rows of packed tokens are taken apart into their documents, and each document is looked up by its tokens: so the answers
belong to exactly these tokens, wherever they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.digests import json_digest
from stillroom.errors import DataError, PairError
from stillroom.language import describe_tokenizer
from stillroom.teachers.published.mapping import BadRowError
from stillroom.teachers.published.place import Source, source_of
from stillroom.teachers.published.token_rows import Layout, Reader, TokenRow, check_shift, reader_of
from stillroom.types import Batch, Identity, Signal, Sparse

Document = tuple[int, ...]  # the tokens of a text but the last, which is only a label
SHOWN = 8


@dataclass(frozen=True, eq=False)
class PublishedTokens:
    """See ``published_tokens``. ``documents``: (id, (tokens, which were answered)), for ``stillroom.pack``."""

    rows: Mapping[Document, TokenRow]
    documents: Sequence[tuple[str, tuple[list[int], list[bool]]]]
    aside: Sequence[tuple[str, str]]
    width: int
    vocabulary: int
    identity: Identity
    tokenizer: Any

    def __call__(self, batch: Batch) -> Signal:
        """Sparse logits [B, T, K] for tokens and positions [B, T]; what stands beyond texts says nothing (mass 1).

        Raises DataError for a text, or a position that counts, without an answer.
        """
        tokens, positions = batch.inputs["tokens"], batch.inputs["positions"]
        assert isinstance(tokens, Tensor)
        assert isinstance(positions, Tensor)
        shape = (*tokens.shape, self.width)
        ids, log_probs = np.zeros(shape, dtype=np.int64), np.full(shape, -np.inf)
        counted = np.ones(tokens.shape, bool) if batch.mask is None else batch.mask.cpu().numpy()
        for n, (row, places) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            starts = [t for t, place in enumerate(places) if place == 0]
            for begin, end in zip(starts, [*starts[1:], len(row)], strict=True):
                if not counted[n, begin:end].any():  # padding
                    continue
                said = self._said(row[begin:end], batch.ids[n])
                width = said.ids.shape[1]
                ids[n, begin:end, :width], log_probs[n, begin:end, :width] = said.ids, said.log_probs
        lacking = counted & ~np.isfinite(log_probs).any(-1)
        if lacking.any():
            raise DataError(f"{batch.ids[int(lacking.any(1).argmax())]!r} counts tokens that were not answered.")
        return Signal(logits=_sparse(ids, log_probs, self.vocabulary))

    def told(self) -> str:
        """How many texts can be used, for people."""
        return f"{len(self.documents)} published texts can be used, {len(self.aside)} are set aside"

    def _said(self, tokens: list[int], name: str) -> TokenRow:
        found = self.rows.get(tuple(tokens))
        if found is None:
            raise DataError(
                f"{name!r} holds a text without published answers (it begins with the tokens {tokens[:SHOWN]}). Pack "
                "teacher.documents, in rows that hold the longest whole (too_long='refuse')."
            )
        return found


def _sparse(ids: np.ndarray, log_probs: np.ndarray, vocabulary: int) -> Sparse:
    kept = torch.from_numpy(log_probs)
    mass = kept.exp().sum(-1)
    rest = torch.log1p(-mass.clamp(max=1.0)).float()  # -inf where the entries hold it all
    found = torch.from_numpy(ids)
    # places that hold nothing repeat the first id: an id of its own would count twice
    found = torch.where(kept == -torch.inf, found[..., :1], found)
    return Sparse(found, kept.float(), rest, vocabulary)


def published_tokens(
    path: str | Path,
    *,
    tokenizer: Any,
    layout: Layout | None = None,
    columns: Mapping[str, str] | None = None,
    id: str | None = None,
    vocabulary: int | None = None,
    split: str | None = None,
    by: str | None = None,
    licence: str | None = None,
    folder: Path | None = None,
) -> PublishedTokens:
    """A teacher from published log-probabilities of tokens: a file, a folder, or 'hf:org/name'.

    ``layout``, by default told from the columns: ``distillkit`` (compressed captures), ``top_k`` (token_ids,
    top_values), ``axolotl`` (target_token_ids, target_logprobs; renormalised over the kept ids by its own
    preparation, so no mass is left for the rest), ``vllm`` (axolotl's input: entries {"token": "token_id:17",
    "logprob"}). ``columns``: other names for tokens, ids, log_probs. ``tokenizer``: that of the tokens; its
    ``vocabulary`` is its length. Entries of the text's own position, or of the next: each layout's convention is
    known, and rows that contradict it are refused.

    The rest of the mass is 1 - the sum of the entries; a mass above 1 by at most 5 % (lossy codes) is scaled to 1. Rows
    that cannot be used are set aside. Raises DataError where none is left, PairError for shifted rows and for ids
    beyond the vocabulary.
    """
    source = source_of(path, folder, split)
    reader = reader_of(source, layout, columns or {})
    rows, documents, aside = _read(source, reader, id)
    if not rows:
        raise DataError(f"{source.name}: no row can be used ({aside[0][0]}: {aside[0][1]})." if aside else "no rows.")
    check_shift(list(rows.values()), source.name)
    size = vocabulary or len(tokenizer)
    largest = max(int(row.ids[np.isfinite(row.log_probs)].max(initial=0)) for row in rows.values())
    largest = max(largest, *(int(row.tokens.max()) for row in rows.values()))
    if largest >= size:
        raise PairError(f"{source.name} names id {largest}, but the tokenizer has {size}: it is another tokenizer's.")
    identity = Identity(
        name=f"{by}, as published in {source.name}" if by else source.name,
        digest=json_digest({"files": source.digest, "columns": dict(columns or {}), "layout": layout}),
        kind="published",
        licence=licence or source.licence,
        route="published-outputs",
        source=source.source,
        revision=source.revision,
        **describe_tokenizer(tokenizer),
    )
    width = max(row.ids.shape[1] for row in rows.values())
    return PublishedTokens(rows, documents, aside, width, size, identity, tokenizer)


def _read(
    source: Source, reader: Reader, id: str | None
) -> tuple[dict[Document, TokenRow], list[tuple[str, tuple[list[int], list[bool]]]], list[tuple[str, str]]]:
    rows: dict[Document, TokenRow] = {}
    documents: dict[str, tuple[list[int], list[bool]]] = {}
    aside: list[tuple[str, str]] = []
    for number, line in enumerate(source.lines()):
        try:
            if line.row is None:
                raise BadRowError(line.wrong)
            name = f"{number:08d}" if id is None else str(line.row.get(id) or "")
            if not name or name in documents:
                raise BadRowError("an id that occurs twice" if name else f"no {id!r}")
            row = reader(line.row)
        except BadRowError as error:
            aside.append((line.place, str(error)))
            continue
        answered = np.asarray(np.isfinite(row.log_probs).any(1))
        if not answered.any():
            aside.append((line.place, "no entries"))
            continue
        documents[name] = (row.tokens.tolist(), [False, *answered.tolist()])
        # the last token is nobody's input; texts that differ there alone share their answers
        rows.setdefault(tuple(row.tokens[:-1].tolist()), row)
    return rows, list(documents.items()), aside

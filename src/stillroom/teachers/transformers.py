"""Text teachers from transformers: an encoder with a fitted head, or a ready classifier. The library is only here.

No code of a model's repository is run (trust_remote_code=False), and a folder is read without asking any hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.digests import state_digest
from stillroom.errors import DataError, MissingFileError, UsageError, missing_extra, nearest
from stillroom.labels import class_labels, labelled_batch
from stillroom.network import Answers, answer
from stillroom.places import Place, locate
from stillroom.progress import bar
from stillroom.teachers.heads import fit_head
from stillroom.teachers.networks import evaluating
from stillroom.types import Batch, Column, Examples, Identity, Signal

try:
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging
except ImportError as error:
    raise missing_extra("transformers", "text") from error

Pooling = Literal["mean", "first"]
ROWS = 32  # texts that run together, of similar length, so that little of the work is padding


@dataclass(frozen=True)
class Tokens:
    """Texts -> (ids, mask), int64 [B, L], padded on the right to the longest text, of at most ``length`` tokens."""

    tokenizer: Any
    length: int
    column: str = "text"

    def texts(self, inputs: Mapping[str, Column]) -> tuple[str, ...]:
        """The text column. Raises DataError with the nearest name when it is missing or holds tensors."""
        found = inputs.get(self.column)
        if found is None or isinstance(found, Tensor):
            raise DataError(f"there is no text column {self.column!r}{nearest(self.column, inputs)}")
        return found

    def numbers(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=self.length, padding=False)["input_ids"]

    def __call__(self, inputs: Mapping[str, Column]) -> tuple[Tensor, ...]:
        return self.padded(self.numbers(self.texts(inputs)))

    def padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows), default=0) or 1
        filler = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids, mask


@dataclass(frozen=True, eq=False)
class TextNetwork:
    """A transformers network that answers texts, a Model. An answer does not depend on the texts that share its batch,
    beyond rounding. Features of shape [B, L, ...] are padded with zeros to the longest text of the batch.
    """

    net: nn.Module
    tokens: Tokens
    identity: Identity
    answers: Answers = "logits"
    features: tuple[str, ...] = ()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        with evaluating(self.net):
            return in_groups(self.tokens.numbers(self.tokens.texts(batch.inputs)), self._ask)

    def _ask(self, rows: Sequence[list[int]]) -> Signal:
        # the rows are adapted already: the batch only carries how many there are
        some = Batch(ids=tuple(map(str, range(len(rows)))), inputs={})
        return answer(self.net, some, lambda _: self.tokens.padded(rows), self.answers, self.features)

    def with_features(self, paths: tuple[str, ...]) -> TextNetwork:
        """The same teacher that also gives the outputs of these modules."""
        return dataclasses.replace(self, features=tuple(dict.fromkeys((*self.features, *paths))))


def in_groups(rows: Sequence[list[int]], ask: Callable[[Sequence[list[int]]], Signal]) -> Signal:
    """Ask groups of rows of similar length, and put the answers back in order."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    groups = [ask([rows[row] for row in order[start : start + ROWS]]) for start in range(0, len(order), ROWS)]
    if not groups:
        raise DataError("there are no texts to answer (0 rows).")
    back = torch.argsort(torch.tensor(order))
    parts: list[list[Tensor]] = []
    for group in groups:
        tensors: list[Tensor] = []
        group.map(lambda tensor, into=tensors: (into.append(tensor), tensor)[1])
        parts.append(tensors)
    whole = iter([_joined(pieces)[back.to(pieces[0].device)] for pieces in zip(*parts, strict=True)])
    return groups[0].map(lambda _: next(whole))


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    if pieces[0].dim() > 2 and len({piece.shape[1] for piece in pieces}) > 1:
        longest = max(piece.shape[1] for piece in pieces)
        pieces = [
            nn.functional.pad(piece, (0, 0) * (piece.dim() - 2) + (0, longest - piece.shape[1])) for piece in pieces
        ]
    return torch.cat(list(pieces))


class Pool(nn.Module):
    """Hidden states [B, L, D] and mask [B, L] -> embeddings [B, D] of length 1: the mean, or the first token."""

    def __init__(self, pooling: Pooling):
        super().__init__()
        if pooling not in ("mean", "first"):
            raise UsageError(f"pooling is {pooling!r}; choose 'mean' or 'first'.")
        self.pooling = pooling

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "first":
            return nn.functional.normalize(hidden[:, 0], dim=-1)
        kept = mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1), dim=-1)


class EncoderWithHead(nn.Module):
    """ids, mask [B, L] -> log-probabilities [B, V]. The embeddings [B, D] are the output of 'pool'."""

    def __init__(self, encoder: nn.Module, pool: Pool, head: nn.Module):
        super().__init__()
        self.encoder, self.pool, self.head = encoder, pool, head

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head(self.pool(hidden, mask)).log_softmax(-1)


def encoder_with_head(
    model: str | Path,
    examples: Examples,
    length: int = 64,
    pooling: Pooling = "mean",
    column: str = "text",
    licence: str | None = None,
) -> TextNetwork:
    """A frozen encoder with a linear head fitted on the labelled rows: its answers are log-probabilities [B, V].

    ``model``: 'hf:org/name', 'package:NAME/sub/folder' or a folder. ``length``: tokens of a text that are read.
    The head is multinomial logistic regression on the embeddings (``teachers.heads``); what it saw is the labelled
    rows of ``examples`` and nothing else. Its classes are the examples' own. Raises DataError when no row is labelled,
    MissingFileError when the model cannot be had.
    """
    place = locate(model)
    batch = labelled_batch(examples)
    labels, classes = class_labels(batch, getattr(examples, "classes", None))
    tokens = Tokens(_load(AutoTokenizer, place), _length(length), column)
    net = EncoderWithHead(_load(AutoModel, place, dtype=torch.float32), Pool(pooling), nn.Identity()).eval()
    net.head = fit_head(_embed(net, tokens, tokens.texts(batch.inputs)), labels, len(classes)).eval()
    return _teacher(net, tokens, place, classes, licence)


@torch.no_grad()
def _embed(net: EncoderWithHead, tokens: Tokens, texts: Sequence[str]) -> Tensor:
    found = []
    rows = tokens.numbers(texts)
    with bar("embed labelled texts", len(rows)) as step:

        def ask(some: Sequence[list[int]]) -> Signal:
            ids, mask = tokens.padded(some)
            step(len(some))
            return Signal(values=net.pool(net.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask))

        found = in_groups(rows, ask).need_values()
    return found


def sequence_classifier(
    model: str | Path, length: int = 256, column: str = "text", licence: str | None = None
) -> TextNetwork:
    """A ready sequence classifier (or regressor, one label: it answers 'values') from a hub, package or folder.

    Its classes are its configuration's, in the order of its logits.
    """
    place = locate(model)
    net = _load(AutoModelForSequenceClassification, place, dtype=torch.float32).eval()
    names = net.config.id2label
    classes = tuple(str(names[number]) for number in range(net.config.num_labels))
    tokens = Tokens(_load(AutoTokenizer, place), _length(length), column)
    if net.config.num_labels == 1:
        return dataclasses.replace(_teacher(net, tokens, place, None, licence), answers="values")
    return _teacher(net, tokens, place, classes, licence)


def _teacher(
    net: nn.Module, tokens: Tokens, place: Place, classes: tuple[str, ...] | None, licence: str | None
) -> TextNetwork:
    net.requires_grad_(False)
    encoder = getattr(net, "encoder", net) if isinstance(net, EncoderWithHead) else net
    identity = Identity(
        name=f"{place.title} ({type(net).__name__})",
        digest=state_digest(net.state_dict()),
        kind="transformers",
        licence=licence or place.licence,
        source=place.source,
        revision=getattr(getattr(encoder, "config", None), "_commit_hash", None),
        classes=classes,
    )
    return TextNetwork(net, tokens, identity)


def _length(length: int) -> int:
    if length < 3:
        raise UsageError(f"length is {length}; a text needs at least 3 tokens (two of them mark its ends).")
    return length


def _load(kind: Any, place: Place, **options: Any) -> Any:
    shown = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()  # its bar per tensor says nothing to a person who asked for a teacher
        return kind.from_pretrained(place.name, trust_remote_code=False, local_files_only=place.local, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = (
            "Check that the folder holds config.json, the weights and the tokenizer's files."
            if place.local
            else "Without a connection to a hub, give a folder, or a package as package:NAME/sub/folder."
        )
        raise MissingFileError(f"{place.source} cannot be loaded ({reason}) {advice}") from None
    finally:
        if shown:
            logging.enable_progress_bar()

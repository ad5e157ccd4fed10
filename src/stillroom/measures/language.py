"""Bits per byte: the one quality of language models that compares across tokenizers. Labels [B, T] are next tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import DataError, ShapeError, UsageError
from stillroom.language import boundaries, next_token
from stillroom.measures.bootstrap import Interval, bootstrap
from stillroom.measures.classification import surprise
from stillroom.measures.reading import label_log_probs
from stillroom.measures.sums import RatioOfSums
from stillroom.types import Batch, Signal

Window = tuple[int, list[int]]  # number of the document, its ids: each but the first is predicted


def nats_and_bytes(student: Signal, teacher: Signal, batch: Batch) -> Tensor:
    """-log2 p(label) summed, over the UTF-8 bytes of the labels. The end mark's bits count; it has 0 bytes.

    Raises DataError where the batch does not say how many bytes its labels are.
    """
    nats, count = surprise(student, teacher, batch).unbind(-1)
    lengths = batch.extra.get("bytes")
    if lengths is None or batch.labels is None:
        raise DataError(
            "bits per byte needs the bytes of every label, and these examples have no extra['bytes']. "
            "Make them with stillroom.data.pack, or give the column [B, T]."
        )
    if lengths.shape != batch.labels.shape:
        raise ShapeError(f"bytes have shape {list(lengths.shape)}, but labels {list(batch.labels.shape)}.")
    counts = batch.labels >= 0 if batch.mask is None else (batch.labels >= 0) & batch.mask
    size = (lengths * counts).reshape(len(batch), -1).sum(-1).to(nats)
    return torch.stack([nats, size], -1).masked_fill(count.isnan().unsqueeze(-1), float("nan"))


def bits_per_byte_of_texts(
    net: nn.Module, tokenizer: Any, texts: Sequence[str], length: int = 1024, replicates: int = 1000, seed: int = 0
) -> Interval:
    """Bits per byte of texts under a transformers causal language model, with its 95 % interval over the texts.

    sum of -log2 p(token | before) / UTF-8 bytes of the texts; the end mark is predicted too, and has 0 bytes. Each
    model reads its own tokens, so models of different tokenizers compare; for a paired interval of two models give
    the ``nats_and_bytes_of_texts`` of both to ``paired_bootstrap``. A text of more than ``length`` tokens is read in
    windows that share no context.
    """
    rows = nats_and_bytes_of_texts(net, tokenizer, texts, length)
    found = bootstrap([rows], RatioOfSums("bits"), replicates, seed)
    if found is None:
        raise DataError("bits per byte is not finite: the model gives a token of these texts probability 0, or NaN.")
    return found


@torch.no_grad()
def nats_and_bytes_of_texts(net: nn.Module, tokenizer: Any, texts: Sequence[str], length: int = 1024) -> Tensor:
    """(nats, UTF-8 bytes) [N, 2] of each text: bits per byte is their ratio. Raises DataError for an empty text."""
    if length < 2:
        raise UsageError(f"length={length} cannot be used: a window needs 2 tokens or more.")
    if not texts or not all(texts):
        empty = f"text {list(texts).index('')} is empty" if texts else "there are no texts"
        raise DataError(f"{empty}: bits per byte divides by bytes. Leave empty texts out.")
    rows = torch.tensor([[0.0, len(text.encode())] for text in texts], dtype=torch.float64)
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    try:
        for windows in _rows_of(texts, tokenizer, length):
            tokens = [token for _, ids in windows for token in ids[:-1]]
            labels = torch.tensor([token for _, ids in windows for token in ids[1:]], device=device)
            places = [place for _, ids in windows for place in range(len(ids) - 1)]
            owners = torch.tensor([number for number, ids in windows for _ in ids[1:]])
            said = next_token(net, torch.tensor([tokens], device=device), torch.tensor([places], device=device))
            rows[:, 0].index_add_(0, owners, -label_log_probs(said[0], labels).double().cpu())
    finally:
        net.train(training)
    return rows


def _rows_of(texts: Sequence[str], tokenizer: Any, length: int) -> Iterator[list[Window]]:
    """Windows of texts, as many as fit into ``length`` positions at a time."""
    begin, end = boundaries(tokenizer)
    row: list[Window] = []
    room = length
    for number, text in enumerate(texts):
        ids = [begin, *tokenizer(text, add_special_tokens=False)["input_ids"], end]
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            if len(window) - 1 > room:
                yield row
                row, room = [], length
            row.append((number, window))
            room -= len(window) - 1
    yield row

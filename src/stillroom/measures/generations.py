"""What causal language models write, freely and side by side: greedy, transformers' own cache, one text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.language import boundaries, is_causal
from stillroom.language.writing import greedy
from stillroom.measures.asking import Seeds
from stillroom.types import Examples

PROMPTS = 4
PROMPT = 24  # tokens of a plain text's beginning; of a conversation, all before the first answer
LONGEST = 256  # tokens of a prompt
WRITTEN = 48  # tokens


def causal_net(model: Any) -> nn.Module | None:
    """The causal language model that a teacher or student holds; None for anything else."""
    net = getattr(model, "net", None)
    return net if isinstance(net, nn.Module) and is_causal(net) else None


def side_by_side(rows: Mapping[str, Seeds], examples: Examples, tokenizer: Any) -> list[dict[str, Any]]:
    """The beginnings of a few evaluation texts, and how each row (its first seed) goes on; greedy, so there is no luck.

    [{"id", "prompt", "text": how the text itself goes on, "rows": {row: {"text", "ended"}}}].
    """
    nets = {row: net for row, seeds in rows.items() if (net := causal_net(seeds[0])) is not None}
    ends = {boundaries(tokenizer)[1], tokenizer.eos_token_id}
    found = []
    for name, ids, size in _prompts(examples):
        prompt, follows = ids[:size], ids[size : size + WRITTEN]
        said = {}
        for row, net in nets.items():
            device = next(net.parameters()).device
            tokens = list(greedy(net, torch.tensor([prompt], device=device), WRITTEN, ends))
            said[row] = {"text": _text(tokenizer, tokens), "ended": tokens[-1] in ends}
        texts = {"prompt": _text(tokenizer, prompt), "text": _text(tokenizer, follows)}
        found.append({"id": name, **texts, "rows": said})
    return found


def _prompts(examples: Examples) -> Iterator[tuple[str, list[int], int]]:
    """(id, the ids of a document, how many of them are the prompt), from rows spread over the examples."""
    places = torch.linspace(0, len(examples) - 1, min(len(examples), 8 * PROMPTS)).long().unique().tolist()
    found = 0
    for place in places[:: max(1, len(places) // (2 * PROMPTS))]:  # twice as many as wanted: some may not fit
        batch = examples.batch([place], None)
        ids, size = _document(batch.inputs["tokens"][0], batch.extra["documents"][0], batch.mask)  # type: ignore[arg-type]
        if 0 < size <= LONGEST and found < PROMPTS:
            found += 1
            yield batch.ids[0], ids, size


def _document(tokens: Tensor, documents: Tensor, mask: Tensor | None) -> tuple[list[int], int]:
    """The first document of a row, and the size of its prompt: 0 for one that is too short to go on from."""
    ids = tokens[documents == documents[0]].tolist()
    first = 0 if mask is None else int(mask[0, : len(ids)].long().argmax())
    return ids, first + 1 if first else min(PROMPT, len(ids) // 2)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)

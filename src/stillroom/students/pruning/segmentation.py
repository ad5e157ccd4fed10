"""Which ids of a tokenizer a domain needs, and the tokenizer that has only those and segments the domain as before.

Byte-pair encoding only: byte-level (SmolLM2, Qwen, Llama 3) and SentencePiece's with byte fallback (Gemma, Llama 2).
Why what is kept suffices: inside a token of the final segmentation BPE merges exactly as it would on that token alone,
so with all pieces of that derivation and their merges kept, every step finds the same pair first; and as merges are
only taken away, none can come before it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UsageError, missing_extra
from stillroom.language import tokenizer_digest

UNUSED = re.compile(
    r"unused|reserved", re.IGNORECASE
)  # tokens that a model keeps for others to define: often thousands
ORIGINAL = "original_ids"  # in tokenizer_config.json: the id that each id had
CARRIED = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")
Ranks = dict[tuple[str, str], int]


def count_ids(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """How often each id occurs in the texts, int64 [V]. The texts are streamed."""
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    stream = iter(texts)
    while some := list(islice(stream, 256)):
        found = [number for ids in tokenizer(some, add_special_tokens=False)["input_ids"] for number in ids]
        counts += torch.bincount(torch.tensor(found, dtype=torch.int64), minlength=len(counts))
    return counts


def choose_ids(tokenizer: Any, counts: Tensor, size: int | None = None, needed: Iterable[int] = ()) -> list[int]:
    """The ids to keep, ascending, at most ``size``.

    Always: added tokens (special ones, marks of chats; named "unused" or "reserved" only where used), single bytes,
    ``needed``. Then the most frequent of ``counts`` [V], each with the pieces that BPE forms on its way to it.
    Raises UsageError for a size too small for what is always kept.
    """
    content = _content(tokenizer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens = {number: token for token, number in vocabulary.items()}
    ranks = _ranks(content)
    used = set(torch.nonzero(counts).flatten().tolist())
    if unknown := used - tokens.keys():
        raise UsageError(f"id {min(unknown)} is not in the tokenizer's vocabulary of {len(tokens)}. Count with it.")
    kept = {number for number in needed if number in tokens} | set(tokenizer.all_special_ids)
    for added in content["added_tokens"]:
        if added["id"] in used or not UNUSED.search(added["content"]):
            kept.add(added["id"])
    kept |= {vocabulary[token] for token in _single_bytes(content) if token in vocabulary}
    limit = len(tokens) if size is None else size
    if len(kept) > limit:
        raise UsageError(f"size={size} is too small: added tokens and single bytes alone are {len(kept)} ids.")
    added_ids = {added["id"] for added in content["added_tokens"]}
    for number in sorted(used, key=lambda number: (-int(counts[number]), number)):
        pieces = {tokens[number]} if number in added_ids else derivation(tokens[number], ranks)
        with_pieces = kept | {number} | {vocabulary[piece] for piece in pieces if piece in vocabulary}
        if len(with_pieces) <= limit:
            kept = with_pieces
    return sorted(kept)


def derivation(token: str, ranks: Ranks) -> set[str]:
    """Every piece that byte-pair encoding forms on its way to this token, its single characters included."""
    pieces = list(token)
    seen = set(pieces)
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, math.inf), n) for n, pair in enumerate(pairwise(pieces)))
        if rank == math.inf:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        seen.add(pieces[at])
    return seen


def cut_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A fast tokenizer of transformers with these ids only, renumbered 0, 1, ... in their order.

    Its ``init_kwargs["original_ids"]`` (in tokenizer_config.json once saved) are the ids before any cut.
    """
    try:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise missing_extra("transformers", "text") from error
    content, new = _content(tokenizer), {old: number for number, old in enumerate(kept)}
    # added tokens too are put into the model's own vocabulary: those outside are renumbered when a file is read
    vocabulary = {token: new[old] for token, old in tokenizer.get_vocab().items() if old in new}
    model = content["model"]
    model["merges"] = [
        [a, b] for a, b in _merges(content) if a in vocabulary and b in vocabulary and a + b in vocabulary
    ]
    model["vocab"] = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
    content["added_tokens"] = [
        {**added, "id": new[added["id"]]} for added in content["added_tokens"] if added["id"] in new
    ]
    content["post_processor"] = _renumbered(content.get("post_processor"), new)
    content["padding"] = content["truncation"] = None  # settings of a call
    carried = {name: value for name in CARRIED if (value := getattr(tokenizer, name, None)) is not None}
    switches = {
        name: tokenizer.init_kwargs[name]
        for name in ("add_bos_token", "add_eos_token")
        if name in tokenizer.init_kwargs
    }
    before = tokenizer.init_kwargs.get(ORIGINAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: token for name, token in tokenizer.special_tokens_map.items() if str(token) in vocabulary},
        **carried,
        **switches,
        original_ids=list(kept) if before is None else [before[old] for old in kept],
        original_tokenizer=tokenizer.init_kwargs.get("original_tokenizer") or tokenizer_digest(tokenizer),
    )
    if made.get_vocab() != vocabulary:
        raise UsageError(
            f"{type(tokenizer).__name__} cannot be cut: the tokenizers library gives its ids other numbers."
        )
    return made


def original_ids(tokenizer: Any) -> Tensor | None:
    """The id that each id had before the vocabulary was cut, int64 [V]; None for a tokenizer that was not cut."""
    numbers = tokenizer.init_kwargs.get(ORIGINAL)
    return None if numbers is None else torch.tensor(numbers, dtype=torch.int64)


def _content(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{type(tokenizer).__name__} is not backed by the tokenizers library. Use its fast version.")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UsageError(
            f"a tokenizer of kind {model.get('type')} cannot be cut: only byte-pair encoding without marks inside "
            "words can (Llama, Qwen, Gemma, SmolLM). Keep its whole vocabulary."
        )
    return content


def _merges(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in content["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _ranks(content: dict[str, Any]) -> Ranks:
    return {pair: rank for rank, pair in enumerate(_merges(content))}


def _single_bytes(content: dict[str, Any]) -> list[str]:
    """The tokens into which any text can be broken."""
    if content["model"].get("byte_fallback"):
        return [f"<0x{byte:02X}>" for byte in range(256)]
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def _renumbered(part: Any, new: dict[int, int]) -> Any:
    """A post-processor with new numbers: {"ids": [...], "tokens": [...]} of templates, ["</s>", 2] of older kinds."""
    if isinstance(part, dict):
        return {
            key: [new[old] for old in value] if key == "ids" else _renumbered(value, new) for key, value in part.items()
        }
    if isinstance(part, list):
        pair = len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int)
        return [part[0], new[part[1]]] if pair else [_renumbered(value, new) for value in part]
    return part

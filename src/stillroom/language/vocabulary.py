"""What the ids of a tokenizer mean: the digest of a vocabulary, the bytes of a token, where documents begin and end."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from stillroom.digests import json_digest
from stillroom.errors import UsageError

_digests: dict[str, str] = {}  # sha256 of a tokenizer as written -> its digest, which takes a second for 50,000 ids
DOCUMENT_MARKS = ("<|endoftext|>", "<|end_of_text|>")  # what base models put between documents


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what ids mean: every id's token, and the merges. Equal size with another mapping is another digest.

    Settings of one call (padding, truncation) and the chat template are not part of it.
    """
    written = _backend(tokenizer).to_str()
    key = hashlib.sha256(written.encode()).hexdigest()
    if key not in _digests:
        model = json.loads(written)["model"]
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges", ())]
        tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items())
        _digests[key] = json_digest({"tokens": [[number, token] for number, token in tokens], "merges": merges})
    return _digests[key]


def template_digest(template: str | None, settings: dict[str, Any] | None = None) -> str | None:
    """sha256 of a chat template and the settings it is rendered with (such as enable_thinking); None without one."""
    return None if template is None else json_digest({"template": template, "settings": settings or {}})


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What an Identity says of a tokenizer: the digests of its vocabulary and of its chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return {"tokenizer": tokenizer_digest(tokenizer), "template": template_digest(template)}


def boundaries(tokenizer: Any) -> tuple[int, int]:
    """The ids that begin and end a document of plain text.

    The begin: what the tokenizer itself puts first, else the mark between documents, else bos, else eos. Every byte
    of a document is predicted from a begin, so bits per byte compare across tokenizers.
    Raises UsageError for a tokenizer without any such token.
    """
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in DOCUMENT_MARKS if mark in tokenizer.get_vocab()]
    first = tokenizer("").input_ids
    begins = [*first[:1], *marks, tokenizer.bos_token_id, tokenizer.eos_token_id]
    ends = [*(() if first else marks), tokenizer.eos_token_id, *marks, *first[:1]]
    begin = next((number for number in begins if number is not None), None)
    end = next((number for number in ends if number is not None), None)
    if begin is None or end is None:
        raise UsageError("the tokenizer has no begin, end or document mark. Set its bos_token or eos_token.")
    return int(begin), int(end)


def byte_lengths(tokenizer: Any, size: int | None = None) -> Tensor:
    """How many UTF-8 bytes of text each id stands for, int64 [V]; special tokens stand for none.

    Byte-level and SentencePiece (▁, <0xNN>) vocabularies. ``size``: V, where the model pads its vocabulary.
    """
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = torch.zeros(max(size or 0, max(vocabulary.values()) + 1), dtype=torch.int64)
    byte_level = is_byte_level(tokenizer)
    for token, number in vocabulary.items():
        if number not in special and number not in added:
            found[number] = len(token_bytes(token, byte_level))
    return found


def token_bytes(token: str, byte_level: bool) -> bytes:
    """The UTF-8 bytes of one vocabulary entry: GPT-2's byte alphabet, or SentencePiece's ▁ and <0xNN>."""
    if byte_level:
        return bytes(_BYTE_OF[c] for c in token) if all(c in _BYTE_OF for c in token) else token.encode()
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary writes bytes in GPT-2's alphabet."""
    parts = json.loads(_backend(tokenizer).to_str())
    return "ByteLevel" in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{type(tokenizer).__name__} is not backed by the tokenizers library. Use its fast version.")
    return backend


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

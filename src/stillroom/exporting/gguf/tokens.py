"""The tokenizer inside a GGUF file: tokens, merges, marks and the chat template, for byte-level BPE vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stillroom.errors import UsageError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is cut before merges apply, by the name that llama.cpp has for it.
CUTS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "regex": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_WORDS}"},
        {"type": "ByteLevel", "use_regex": False},
    ],
    "qwen2": [
        {"type": "Split", "regex": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_WORDS}"},
        {"type": "ByteLevel", "use_regex": False},
    ],
}


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Put the tokenizer into a gguf.GGUFWriter; ids up to ``size`` (the embedding's rows) that mean nothing are unused.

    Raises UsageError for a vocabulary that is no byte-level BPE, cuts texts in a way that llama.cpp has no name for, or
    has more ids than the network.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(parts["pre_tokenizer"]):
        raise UsageError(f"gguf export knows byte-level BPE tokenizers; this one is {model['type']}. Use onnx.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_of(parts))
    tokens, types = _tokens(tokenizer, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    alone = tokenizer("").input_ids  # what the tokenizer itself puts around every text
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(bool(alone) and alone[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(alone) > 1 and alone[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)


def cut_of(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer (tokenizer.json) cuts texts into words."""
    found = parts["pre_tokenizer"]
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    shown = [_plain(step) for step in steps]
    for name, cuts in CUTS.items():
        if shown == cuts and (parts["normalizer"] or {"type": "NFC"})["type"] == "NFC":
            return name
    raise UsageError(
        f"gguf export has no name for how this tokenizer cuts texts ({json.dumps(shown)[:300]}, normalizer "
        f"{json.dumps(parts['normalizer'])[:100]}); known: {', '.join(CUTS)}. Use onnx."
    )


def _plain(step: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a step that decides where a text is cut."""
    kept = {name: step[name] for name in ("type", "use_regex", "individual_digits") if name in step}
    if step.get("add_prefix_space"):
        kept["add_prefix_space"] = True
    if step["type"] == "Split":
        plain = step["behavior"] == "Isolated" and not step["invert"]
        kept["regex"] = step["pattern"].get("Regex") if plain else None
    return kept


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Each id's token and its kind, for all ``size`` ids."""
    import gguf

    vocabulary = tokenizer.get_vocab()
    if vocabulary and max(vocabulary.values()) >= size:
        raise UsageError(f"the tokenizer has ids up to {max(vocabulary.values())}, the network {size} rows of them.")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types: list[int] = [gguf.TokenType.UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
        if number in added:
            types[number] = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
    return tokens, types

"""A causal language model as a teacher of packed tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stillroom.digests import state_digest
from stillroom.errors import UsageError
from stillroom.language import describe_tokenizer, load_causal
from stillroom.network import Columns
from stillroom.places import Place
from stillroom.teachers.networks import Network
from stillroom.types import Identity

COLUMNS = Columns(("tokens", "positions"))
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def causal_lm(
    model: str | Path, gguf: str | None = None, precision: str = "fp32", licence: str | None = None
) -> Network:
    """A teacher from a hub ('hf:org/name'), a folder, a package ('package:NAME') or a GGUF file.

    Answers packed tokens with Projected logits: hidden states and the head, never [B, T, V]. It carries its
    ``tokenizer``. Raises MissingFileError when it cannot be had, UsageError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown: choose fp32 or bf16.")
    loaded = load_causal(model, gguf, PRECISIONS[precision])
    return from_causal(loaded.net, loaded.tokenizer, loaded.place, licence)


def from_causal(net: Any, tokenizer: Any, place: Place | None = None, licence: str | None = None) -> Network:
    """A teacher from a transformers causal language model in memory and its tokenizer."""
    net.eval().requires_grad_(False)
    identity = Identity(
        name=place.title if place else type(net).__name__,
        digest=state_digest(net.state_dict()),
        kind="transformers",
        licence=licence or (place.licence if place else "unknown"),
        source=place.source if place else "a network in memory",
        revision=getattr(net.config, "_commit_hash", None),
        **describe_tokenizer(tokenizer),
    )
    return Network(net, COLUMNS, "next_token", (), identity, tokenizer=tokenizer)

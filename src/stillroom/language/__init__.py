"""Causal language models of transformers: loading them, what their ids mean, and how they answer packed tokens."""

from stillroom.language.answers import head_of, next_token
from stillroom.language.loading import Loaded, is_causal, load_causal, write_folder
from stillroom.language.vocabulary import (
    boundaries,
    byte_lengths,
    describe_tokenizer,
    template_digest,
    tokenizer_digest,
)

__all__ = [
    "Loaded",
    "boundaries",
    "byte_lengths",
    "describe_tokenizer",
    "head_of",
    "is_causal",
    "load_causal",
    "next_token",
    "template_digest",
    "tokenizer_digest",
    "write_folder",
]

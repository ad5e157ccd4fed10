"""A causal language model of one's own as a teacher that answers in words: greedy, one question at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.digests import json_digest
from stillroom.errors import UsageError
from stillroom.language import load_causal
from stillroom.language.chat import Chat
from stillroom.language.exchanges import Exchange, answered
from stillroom.language.prompts import Prompt
from stillroom.teachers.causal import from_causal
from stillroom.types import Batch, Identity, Signal


@dataclass(frozen=True, eq=False)
class Writer:
    """See ``writer``. A Model: Batch -> Signal(text=...)."""

    net: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    exchange: Exchange
    new_tokens: int
    stop: str | None
    identity: Identity

    def __call__(self, batch: Batch) -> Signal:
        questions = [self.exchange.question(self.tokenizer, batch, row) for row in range(len(batch))]
        said = [answered(self.net, self.tokenizer, question, self.new_tokens) for question in questions]
        return Signal(text=tuple(text.split(self.stop)[0].strip() if self.stop else text for text in said))


def writer(
    model: str | Path,
    prompt: str,
    *,
    system: str | None = None,
    chat: bool = True,
    thinking: bool | None = None,
    new_tokens: int = 128,
    stop: str | None = None,
    gguf: str | None = None,
    licence: str | None = None,
    classes: Sequence[str] | None = None,
) -> Writer:
    """A model from a hub, folder, package or GGUF file (as ``causal_lm``) that is asked in words and answers in words.

    ``prompt``, ``system``: Jinja2 templates over the columns of an example (and ``classes``). ``chat=False``: the
    prompt is a text to go on with. ``stop``: what ends an answer besides the model's own end mark.
    Raises UsageError for settings that do not fit together.
    """
    if new_tokens < 1 or (system is not None and not chat):
        raise UsageError(f"new_tokens={new_tokens} must be 1 or more, and a system text needs chat: true.")
    loaded = load_causal(model, gguf)
    known = from_causal(loaded.net, loaded.tokenizer, loaded.place, licence).identity
    exchange = Exchange(Prompt(prompt, system), Chat(thinking=thinking) if chat else None, {"classes": classes or ()})
    asked = {"prompt": exchange.prompt.digest, "chat": chat, "thinking": thinking, "stop": stop, "most": new_tokens}
    identity = dataclasses.replace(known, tokenizer=None, template=json_digest({**asked, "chat": known.template}))
    return Writer(loaded.net, loaded.tokenizer, exchange, new_tokens, stop, identity)

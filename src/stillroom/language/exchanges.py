"""A question and its answer as one document of tokens: the question is read, the answer is learned or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stillroom.errors import DataError
from stillroom.language.chat import Chat
from stillroom.language.prompts import Prompt
from stillroom.language.vocabulary import boundaries
from stillroom.language.writing import greedy
from stillroom.types import Batch

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Exchange:
    """How a question is put to a model. ``chat``: by its chat template; None: as plain text, a blank before the answer.

    The answer's tokens are made apart from the question's, so what is learned begins exactly where writing begins.
    """

    prompt: Prompt
    chat: Chat | None = None
    known: Mapping[str, Any] = field(default_factory=dict)  # what a template sees beside the columns

    def question(self, tokenizer: Any, batch: Batch, row: int) -> list[int]:
        """The ids after which the answer is written."""
        return self._tokens(tokenizer, self._parts(tokenizer, self.prompt.fill(batch, row, self.known), "")[0], True)

    def whole(self, tokenizer: Any, batch: Batch, row: int, answer: str) -> tuple[list[int], list[bool]]:
        """All ids, the end mark included, and for each whether it is learned. Raises DataError for an empty answer."""
        if not answer.strip():
            raise DataError(f"the answer to example {batch.ids[row]!r} is empty: there is nothing to learn.")
        before, after = self._parts(tokenizer, self.prompt.fill(batch, row, self.known), answer.strip())
        shown, said = self._tokens(tokenizer, before, True), self._tokens(tokenizer, after, False)
        ends = set(ends_of(tokenizer))
        stop = next((number + 1 for number, token in enumerate(said) if token in ends), len(said))
        said = said[:stop] if stop < len(said) or said[-1] in ends else [*said, boundaries(tokenizer)[1]]
        return [*shown, *said], [False] * len(shown) + [True] * len(said)

    def _parts(self, tokenizer: Any, messages: Messages, answer: str) -> tuple[str, str]:
        """The text before the answer, and the answer as it stands after it."""
        if self.chat is None:
            before = "\n".join(message["content"] for message in messages)
            return before, answer if before[-1:].isspace() else f" {answer}"
        before = self.chat.text(tokenizer, messages, prompt=True)
        until = self.chat.text(tokenizer, [*messages, {"role": "assistant", "content": answer}])
        if not until.startswith(before):
            raise DataError("the chat template writes a question otherwise once it is answered. Leave chat out.")
        return before, until[len(before) :]

    def _tokens(self, tokenizer: Any, text: str, first: bool) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [boundaries(tokenizer)[0], *ids] if first and self.chat is None else list(ids)


def ends_of(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer."""
    return tuple({boundaries(tokenizer)[1], tokenizer.eos_token_id} - {None})


def answered(net: Any, tokenizer: Any, question: Sequence[int], most: int) -> str:
    """The likeliest answer after the ids of a question (greedy), of at most ``most`` tokens, as text."""
    ends = ends_of(tokenizer)
    read = torch.tensor([list(question)], device=next(net.parameters()).device)
    said = [token for token in greedy(net, read, most, ends) if token not in ends]
    return tokenizer.decode(said, skip_special_tokens=True).strip()

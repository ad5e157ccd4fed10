"""Conversations as tokens: the template and its thinking switch are said, and which tokens the assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stillroom.errors import DataError, UsageError
from stillroom.language.vocabulary import template_digest

Message = Mapping[str, Any]  # {"role": "user" | "assistant" | "system" | ..., "content": text}
Which = Literal["all", "answers", "last"]  # every token, all that the assistant wrote, its last message


@dataclass(frozen=True)
class Chat:
    """How conversations are rendered. ``template`` None: the tokenizer's own.

    ``thinking``: must be said for a template that knows the switch, since its default differs from model to model.
    ``learn``: which tokens count.
    """

    template: str | None = None
    thinking: bool | None = None
    learn: Which = "answers"

    def digest(self, tokenizer: Any) -> str | None:
        """The digest of the template alone, as an Identity says it."""
        return template_digest(self._template(tokenizer))

    def rendering(self, tokenizer: Any) -> str | None:
        """The digest of template, switch and what counts: equal only where the same rows come out."""
        return template_digest(self._template(tokenizer), {**self._settings(), "learn": self.learn})

    def __call__(self, tokenizer: Any, messages: Sequence[Message], name: str) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and for each whether the assistant wrote it.

        Raises DataError, naming the conversation, when it has no answer, or when the template rewrites earlier turns
        (removes their thoughts), so that no one rendering holds them all.
        """
        whole = self.text(tokenizer, messages)
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        if self.learn == "all":
            return ids, [True] * len(ids)
        turns = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise DataError(f"conversation {name!r} has no message of the assistant: there is nothing to learn from.")
        spans = [self._span(tokenizer, messages, n, whole, name) for n in turns[-1 if self.learn == "last" else 0 :]]
        return ids, [any(first <= a and b <= last for first, last in spans) and b > a for a, b in offsets]

    def _span(self, tokenizer: Any, messages: Sequence[Message], number: int, whole: str, name: str) -> tuple[int, int]:
        """The characters of one answer within the whole text."""
        before = self.text(tokenizer, messages[:number], prompt=True)
        until = self.text(tokenizer, messages[: number + 1])
        if not (whole.startswith(until) or number + 1 == len(messages)) or not whole.startswith(before):
            raise DataError(
                f"conversation {name!r}: the chat template writes message {number} otherwise once others follow (it "
                "may remove earlier thoughts). Learn from the last answer only (learn='last'), or cut the conversation."
            )
        return len(before), len(until)

    def text(self, tokenizer: Any, messages: Sequence[Message], prompt: bool = False) -> str:
        """The conversation as the template writes it; ``prompt``: and the beginning of an answer after it."""
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=self._template(tokenizer),
            tokenize=False,
            add_generation_prompt=prompt,
            **self._settings(),
        )

    def _template(self, tokenizer: Any) -> str:
        template = self.template or getattr(tokenizer, "chat_template", None)
        if not template:
            raise UsageError("the tokenizer has no chat template. Give one: Chat(template='...').")
        if self.thinking is None and "enable_thinking" in template:
            raise UsageError(
                "this chat template has a thinking switch (enable_thinking), and models differ in its default. "
                "Say it: thinking: true or thinking: false."
            )
        return template

    def _settings(self) -> dict[str, Any]:
        return {} if self.thinking is None else {"enable_thinking": self.thinking}

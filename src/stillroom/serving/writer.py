"""A language model writes for several at once: each text with draws of its own, whoever else asks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UsageError
from stillroom.language import boundaries
from stillroom.language.writing import write

USUAL = 256  # tokens where a request does not say
COLDEST = 1e-6  # a temperature at which the likeliest token is drawn


@dataclass(frozen=True)
class Asked:
    """One text to write: after these ids, so many tokens at most. ``heard(token)`` is told of each as it comes."""

    prompt: tuple[int, ...]
    most: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    heard: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Text:
    """What was written. ``why``: stop (an end mark or a stop text) or length."""

    text: str
    tokens: int
    why: str


class Writer:
    """A student's network and tokenizer that write. One thread at a time."""

    def __init__(self, net: Any, tokenizer: Any) -> None:
        self.net, self.tokenizer = net.eval(), tokenizer
        ends = (boundaries(tokenizer)[1], tokenizer.eos_token_id)
        self.ends = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.room = int(getattr(net.config, "max_position_embeddings", 2048))

    def prompt(self, text: str) -> tuple[int, ...]:
        """The ids of a text, as the student was trained: after the begin mark."""
        return (boundaries(self.tokenizer)[0], *self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """The ids of a conversation up to where the assistant begins. Raises UsageError without a template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("this student's tokenizer has no chat template: ask /v1/completions.")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of Jinja for roles that they do not know
            raise UsageError(f"the chat template does not take these messages ({error}).") from None
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def most(self, prompt: Sequence[int], wanted: int | None) -> int:
        """The tokens to write. Raises UsageError where the prompt, or what is wanted, does not fit the context."""
        room = self.room - len(prompt)
        if room < 1 or (wanted is not None and wanted > room):
            raise UsageError(
                f"{len(prompt)} tokens of prompt and {wanted or 1} to write do not fit the context of {self.room}."
            )
        return wanted or min(USUAL, room)

    def answers(self, asked: Sequence[Asked]) -> list[Text]:
        """The texts, in order; those of one temperature and top_p are written together."""
        found: dict[int, Text] = {}
        for setting in dict.fromkeys((one.temperature, one.top_p) for one in asked):
            places = [n for n, one in enumerate(asked) if (one.temperature, one.top_p) == setting]
            found |= dict(zip(places, self._together([asked[n] for n in places], *setting), strict=True))
        return [found[n] for n in range(len(asked))]

    def _together(self, asked: Sequence[Asked], temperature: float, top_p: float) -> list[Text]:
        longest = max(one.most for one in asked)
        draws = torch.stack([_draws(one.seed, longest) for one in asked])
        left = [one.most for one in asked]

        def heard(tokens: Tensor) -> None:
            for n, (one, token) in enumerate(zip(asked, tokens.tolist(), strict=True)):
                left[n] = 0 if token in self.ends else left[n] - 1
                if one.heard is not None and token not in self.ends and left[n] >= 0:
                    one.heard(token)

        told = heard if any(one.heard for one in asked) else None
        written = write(
            self.net,
            [one.prompt for one in asked],
            draws,
            ends=self.ends,
            temperature=max(temperature, COLDEST),
            top_p=top_p,
            heard=told,
        )
        return [self._text(one, said.tokens[: one.most]) for one, said in zip(asked, written, strict=True)]

    def _text(self, asked: Asked, tokens: Sequence[int]) -> Text:
        ended = bool(tokens) and tokens[-1] in self.ends
        text, cut = until(self.tokenizer.decode(list(tokens), skip_special_tokens=True), asked.stops)
        return Text(text, len(tokens), "stop" if ended or cut else "length")


def until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of ``stops``, and whether one was there."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class Pieces:
    """Tokens to pieces of text: what is certain so far. A character of several tokens comes when it is whole."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.sent = 0
        self.longest = max(map(len, stops), default=1) - 1  # a stop text may have begun

    def add(self, token: int) -> str:
        """The text that this token makes certain, often ''."""
        self.tokens.append(token)
        text, cut = until(self.tokenizer.decode(self.tokens, skip_special_tokens=True), self.stops)
        whole = len(text) if cut else len(text.rstrip("\ufffd")) - self.longest
        return self._upto(text, whole)

    def rest(self, text: str) -> str:
        """What was held back of the whole ``text``."""
        return self._upto(text, len(text))

    def _upto(self, text: str, end: int) -> str:
        piece, self.sent = text[self.sent : max(end, self.sent)], max(end, self.sent)
        return piece


def _draws(seed: int | None, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(secrets.randbits(62) if seed is None else seed % (1 << 63))
    return torch.rand(count, generator=generator)

"""What an answer says, as a Signal: text, words of classes, first tokens, written tokens, tokens of a fixed text.

Each is a frozen dataclass with ``decoding()`` (what it adds to a request), ``need(said, who)`` (raises SignalError
where a server does not give what it reads: nothing is made up), ``problem(said)`` (why one answer cannot be used, or
None) and ``signal(rows)`` of the usable answers: rows[example][draw].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import torch
from torch import Tensor

from stillroom.errors import SignalError, UsageError
from stillroom.types import Dense, Signal, Sparse

Said = Mapping[str, Any]
Rows = Sequence[Sequence[Said]]
FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
LEAST_TAIL = 1e-9  # mass outside what a server names: less is rounding


@dataclass(frozen=True)
class Text:
    """The text as it is; with a ``schema``, JSON that satisfies it, in canonical order."""

    schema: Mapping[str, Any] | None = None
    constrain: bool = True  # tell the server the schema; what comes is checked in any case

    def __post_init__(self) -> None:
        _check_schema(self.schema)

    def decoding(self) -> dict[str, Any]:
        return _response_format(self.schema) if self.constrain else {}

    def need(self, said: Said, who: str) -> None: ...

    def problem(self, said: Said) -> str | None:
        if said["finish"] == "content_filter":
            return "the server filtered it"
        if not said["text"].strip():
            return "it is empty"
        return None if self.schema is None else _parsed(said["text"], self.schema)[1]

    def signal(self, rows: Rows) -> Signal:
        return Signal(text=tuple(self._text(draws[0]["text"]) for draws in rows))

    def _text(self, text: str) -> str:
        if self.schema is None:
            return text
        return json.dumps(_parsed(text, self.schema)[0], ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Label:
    """The word of one class: the whole answer, or the ``field`` of JSON that satisfies ``schema``.

    Probabilities are shares of the draws, logits [B, C] their logarithms: of one draw, 0 and -inf.
    """

    words: tuple[str, ...]
    schema: Mapping[str, Any] | None = None
    field: str = "label"
    constrain: bool = True

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        _check_words(self.words)

    def decoding(self) -> dict[str, Any]:
        return _response_format(self.schema) if self.constrain else {}

    def need(self, said: Said, who: str) -> None: ...

    def problem(self, said: Said) -> str | None:
        return self._label(said["text"])[1]

    def signal(self, rows: Rows) -> Signal:
        counts = torch.zeros(len(rows), len(self.words))
        for row, draws in enumerate(rows):
            for said in draws:
                found, _ = self._label(said["text"])
                assert found is not None
                counts[row, found] += 1
        return Signal(logits=Dense((counts / counts.sum(-1, keepdim=True)).log()))

    def _label(self, text: Any) -> tuple[int | None, str | None]:
        if self.schema is not None:
            found, problem = _parsed(text, self.schema)
            if problem is not None:
                return None, problem
            text = found.get(self.field) if isinstance(found, dict) else found
        folded = [_folded(word) for word in self.words]
        if not isinstance(text, str) or _folded(text) not in folded:
            return None, f"{_short(text)} is none of {', '.join(self.words)}"
        return folded.index(_folded(text)), None


@dataclass(frozen=True)
class Choice:
    """Probabilities of the classes from the answer's first token: logits [B, C] are log-probabilities, normalised.

    ``pieces``: of each class, the texts of first tokens that begin its word. A class that is not among the ``top``
    tokens gets the probability of the least likely one that is: what it can have at most. An answer that has less than
    ``least`` of its probability on the classes is not used.

    ``prior``: of each class, the probability that the model tends to give it whatever is asked; it is divided out
    (batch calibration, Zhou et al. 2023, arXiv 2309.17249). Small models lean to one word by far.
    """

    words: tuple[str, ...]
    top: int = 20
    least: float = 0.01
    prior: tuple[float, ...] | None = None
    pieces: tuple[frozenset[str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _check_words(self.words)
        if self.top < 1 or not 0 <= self.least < 1:
            raise UsageError(f"top={self.top} must be 1 or more, least={self.least} from 0 to less than 1.")
        if self.prior is not None and (len(self.prior) != len(self.words) or not min(self.prior) > 0):
            raise UsageError(f"prior={list(self.prior)}: give each of {len(self.words)} classes a number above 0.")

    def decoding(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": self.top}

    def need(self, said: Said, who: str) -> None:
        if not said["tokens"] or not said["tokens"][0][3]:
            raise SignalError(
                f"{who} does not say how likely the tokens of its answers are (no top_logprobs). Use reads: label, "
                "which takes the answer's word; with samples: 5 and temperature: 1 shares of draws "
                "become probabilities."
            )

    def problem(self, said: Said) -> str | None:
        mass = math.fsum(math.exp(value) for values in self._found(said) for value in values)
        if mass >= self.least and mass > 0:
            return None
        likeliest = ", ".join(repr(one[0]) for one in said["tokens"][0][3][:3])
        return f"{mass:.2%} of the probability is on the classes' words; it would rather begin with {likeliest}"

    def signal(self, rows: Rows) -> Signal:
        return Signal(logits=Dense(torch.stack([self._logits(draws[0]) for draws in rows])))

    def _logits(self, said: Said) -> Tensor:
        least = min(value for _, _, value in said["tokens"][0][3])
        found = [_logsumexp(values) if values else least for values in self._found(said)]
        logits = torch.tensor(found, dtype=torch.float64)
        if self.prior is not None:
            logits = logits - torch.tensor(self.prior, dtype=torch.float64).log()
        return logits.log_softmax(-1).float()

    def _found(self, said: Said) -> list[list[float]]:
        """Of each class, the log-probabilities of the tokens that begin its word."""
        return [[value for text, _, value in said["tokens"][0][3] if text in pieces] for pieces in self.pieces]


@dataclass(frozen=True)
class Tokens:
    """The written tokens' log-probabilities: Sparse logits [B, T, K] with the text; T = ``length``, K = ``top``.

    Places after the end are uniform; features["written"] [B, T] is 1 where a token was written.
    """

    vocabulary: int
    length: int
    top: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.vocabulary or self.length < 1:
            raise UsageError(f"top={self.top} must be 1 to vocabulary={self.vocabulary}, max_tokens 1 or more.")

    def decoding(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": self.top, "return_tokens_as_token_ids": True}

    def need(self, said: Said, who: str) -> None:
        tops = [one for token in said["tokens"] for one in token[3]]
        if said["text"] and not tops:
            raise SignalError(f"{who} does not say how likely the tokens of its answers are (no top_logprobs).")
        if any(one[1] is None for one in tops):
            raise SignalError(
                f"{who} names tokens by their text, which is not unique. llama.cpp gives their ids, vLLM with "
                "return_tokens_as_token_ids; of others, use reads: text."
            )

    def problem(self, said: Said) -> str | None:
        beyond = [one[1] for token in said["tokens"] for one in token[3] if not 0 <= one[1] < self.vocabulary]
        return f"token {beyond[0]} of a vocabulary of {self.vocabulary}" if beyond else None

    def signal(self, rows: Rows) -> Signal:
        shape = (len(rows), self.length)
        ids = torch.arange(self.top).expand(*shape, self.top).clone()
        log_probs = torch.full(ids.shape, -math.log(self.vocabulary))
        rest = torch.full(shape, math.log(max(1 - self.top / self.vocabulary, LEAST_TAIL)))
        written = torch.zeros(shape)
        for row, draws in enumerate(rows):
            for place, token in enumerate(draws[0]["tokens"][: self.length]):
                top = token[3][: self.top]
                ids[row, place] = top[0][1]  # places that are left repeat the first id, with probability 0
                log_probs[row, place] = -math.inf
                ids[row, place, : len(top)] = torch.tensor([one[1] for one in top])
                log_probs[row, place, : len(top)] = torch.tensor([one[2] for one in top])
                mass = math.fsum(math.exp(one[2]) for one in top)
                rest[row, place], written[row, place] = math.log(max(1 - mass, LEAST_TAIL)), 1.0
        texts = tuple(draws[0]["text"] for draws in rows)
        return Signal(Sparse(ids, log_probs, rest, self.vocabulary), features={"written": written}, text=texts)


@dataclass(frozen=True)
class Score:
    """How likely the prompt's own tokens are: features["token_log_probs"] [B, T], zero after the end and at the first
    token; values [B, 1] their sum in nats. T = ``length``. For servers with prompt log-probabilities (vLLM).
    """

    length: int

    def decoding(self) -> dict[str, Any]:
        return {"echo": True, "logprobs": 1, "prompt_logprobs": 1}

    def need(self, said: Said, who: str) -> None:
        if not said["prompt"]:
            raise SignalError(
                f"{who} writes on, but says nothing of the text that was sent: llama.cpp ignores echo, and hosted APIs "
                "never score a text. Use vLLM, or read something else (reads: choice, label, text)."
            )

    def problem(self, said: Said) -> str | None:
        many = len(said["prompt"])
        return f"the text has {many} tokens, and length is {self.length}" if many > self.length else None

    def signal(self, rows: Rows) -> Signal:
        found = torch.zeros(len(rows), self.length)
        for row, draws in enumerate(rows):
            values = [value or 0.0 for _, value in draws[0]["prompt"]]
            found[row, : len(values)] = torch.tensor(values)
        return Signal(values=found.sum(-1, keepdim=True), features={"token_log_probs": found})


Reading = Text | Label | Choice | Tokens | Score


def _check_words(words: Sequence[str]) -> None:
    folded = [_folded(word) for word in words]
    if len(words) < 2 or not all(folded) or len(set(folded)) < len(folded):
        raise UsageError(f"words={list(words)}: two classes or more, each with a word of its own.")


def _check_schema(schema: Any) -> None:
    if schema is None:
        return
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"schema is no JSON Schema (2020-12): {error.message}.") from None


def _response_format(schema: Any) -> dict[str, Any]:
    if schema is None:
        return {}
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    }


def _parsed(text: str, schema: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The JSON of an answer (bare, or one fenced block and nothing besides), and what is wrong with it."""
    fenced = FENCE.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except ValueError:
        return None, f"{_short(text)} is not JSON"
    error = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(found)), None)
    return found, None if error is None else f"{_short(error.message)} at {error.json_path}"


def _folded(word: str) -> str:
    return word.strip().rstrip(".").casefold()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _logsumexp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(math.fsum(math.exp(value - most) for value in values))

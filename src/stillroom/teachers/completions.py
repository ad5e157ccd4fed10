"""A server of /v1/completions as a teacher that scores tokens, and as a writer of rollouts. httpx is only here.

To score, a server must say how likely the tokens of a prompt are: vLLM does (``prompt_logprobs``, or ``echo`` with
``logprobs`` and ``return_tokens_as_token_ids``). llama.cpp and hosted APIs do not: they can write, not score.
Tested against llama.cpp itself (writing) and against a server of the tests that answers in vLLM's documented form with
a real model's numbers (scoring); not against vLLM.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import DataError, SignalError, UsageError, missing_extra
from stillroom.language.writing import Written
from stillroom.types import UNLABELLED, Batch, Identity, Signal, Sparse

LEAST_TAIL = 1e-9  # mass outside what a server names: less is rounding, and log 0 would be an infinite reverse KL
MARK = "token_id:"  # how vLLM writes a token as its number
BUSY = (429, 502, 503, 504)
Parsed = Mapping[int, float]  # token -> log-probability, at one place of a prompt


@dataclass(frozen=True)
class Completions:
    """A server at ``url`` (without /v1). As a Model it answers packed tokens with Sparse logits of ``keep`` entries.

    The kept entries are the token that follows in the text and the likeliest others; the mass of all the rest is one
    bucket. ``vocabulary``: how many ids the server's model has. ``tokenizer``: the digest of its tokenizer
    (language.tokenizer_digest), so that another one is refused. ``key``: the environment variable that holds the key.
    Raises UsageError for a setting out of range, SignalError for a server that does not answer or does not score.
    """

    url: str = field(repr=False)  # an address has no place in a run's folder
    model: str
    vocabulary: int
    keep: int = 20  # vLLM gives at most --max-logprobs, 20 by default
    tokenizer: str | None = None
    licence: str = "unknown"
    key: str | None = field(default=None, repr=False)
    together: int = 8  # requests at a time
    seconds: float = 120.0  # to wait for an answer
    tries: int = 4  # of a request to a server that is busy

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.vocabulary:
            raise UsageError(f"keep={self.keep} of a vocabulary of {self.vocabulary}: choose from 1 to all of it.")
        if self.together < 1 or self.tries < 1:
            raise UsageError(f"together={self.together} and tries={self.tries} must be 1 or more.")

    @property
    def identity(self) -> Identity:
        return Identity(
            self.model, kind="server", licence=self.licence, route="own-account", source="a completions server",
            tokenizer=self.tokenizer,
        )  # fmt: skip

    def __call__(self, batch: Batch) -> Signal:
        """Sparse logits at every position of a document; uniform ones at padding, which nothing counts."""
        tokens: Tensor = batch.inputs["tokens"]  # type: ignore[assignment]
        ids = torch.arange(self.keep).expand(*tokens.shape, self.keep).clone()
        log_probs = torch.full(ids.shape, -math.log(self.vocabulary))
        outside = max((self.vocabulary - self.keep) / self.vocabulary, LEAST_TAIL)
        rest = torch.full(tokens.shape, math.log(outside))
        asked = _documents(batch)
        for (row, start, sent), places in zip(asked, self._each(self._score, asked), strict=True):
            for number, found in enumerate(places):
                where = (row, start + number)
                ids[where], log_probs[where], rest[where] = self._kept(found, sent[number + 1])
        return Signal(logits=Sparse(ids, log_probs, rest, self.vocabulary))

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        *,
        new_tokens: int,
        ends: Sequence[int],
        temperature: float,
        top_p: float,
    ) -> list[Written]:
        """One text after each prompt, as ``language.writing.write`` gives; ``numbers`` seed the server's own draws.

        At temperature 1 and top_p 1 only (UsageError): servers say log-probabilities of the plain distribution, and
        with others nobody would know how likely a token was when it was drawn.
        """
        if temperature != 1 or top_p != 1:
            raise UsageError(f"a server writes at temperature 1 and top_p 1, not {temperature} and {top_p}.")
        asked = list(zip(prompts, numbers, strict=True))

        def one(pair: tuple[Sequence[int], int]) -> Written:
            drawing = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": pair[1] % 2**31}
            asked = {
                "prompt": list(pair[0]),
                "max_tokens": new_tokens,
                "logprobs": 1,
                "verbose": True,
                "return_tokens": True,
            }
            choice = self._post({**asked, **drawing})
            return _written(choice, set(ends), self.url)

        return self._each(one, asked)

    def _each(self, ask: Callable[[Any], Any], asked: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.together) as pool:
            return list(pool.map(ask, asked))

    def _score(self, document: tuple[int, int, list[int]]) -> list[Parsed]:
        """What the server says of every token of a document but the first."""
        sent = document[2]
        choice = self._post(
            {"prompt": sent, "max_tokens": 1, "temperature": 1.0, "echo": True, "logprobs": self.keep}
            | {"prompt_logprobs": self.keep, "add_special_tokens": False}
        )
        places = _places(choice, self.url)[: len(sent)]
        wrong = [n for n in range(1, len(sent)) if n >= len(places) or sent[n] not in places[n]]
        if wrong:
            raise SignalError(
                f"{self.url} scored other tokens than were sent: at place {wrong[0]} of {len(sent)} it says nothing of "
                f"id {sent[wrong[0]]}. Its model has another tokenizer, or it adds tokens of its own."
            )
        return places[1:]

    def _kept(self, found: Parsed, label: int) -> tuple[Tensor, Tensor, float]:
        """The label and the likeliest others, as many as are kept, and the log of the mass outside them."""
        if len(found) < self.keep:
            raise SignalError(
                f"{self.url} gives {len(found)} log-probabilities a place, and keep={self.keep}. Keep fewer, or let "
                "the server give more (vLLM: --max-logprobs)."
            )
        others = sorted((token for token in found if token != label), key=lambda token: -found[token])
        chosen = [label, *others[: self.keep - 1]]
        mass = math.fsum(math.exp(found[token]) for token in chosen)
        if not mass < 1 + 1e-3 or max(chosen) >= self.vocabulary:
            raise SignalError(
                f"{self.url} gives probabilities that sum to {mass:.4f}, ids up to {max(chosen)} of a vocabulary of "
                f"{self.vocabulary}: these are not log-probabilities at temperature 1, or the vocabulary is another."
            )
        return torch.tensor(chosen), torch.tensor([found[t] for t in chosen]), math.log(max(1 - mass, LEAST_TAIL))

    def _post(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first choice of the server's answer. A busy server is asked again after 1, 2, 4, ... seconds."""
        try:
            import httpx
        except ImportError as error:
            raise missing_extra("httpx", "endpoint") from error
        headers = {"Authorization": f"Bearer {os.environ.get(self.key, '')}"} if self.key else {}
        sent = {"model": self.model, "return_tokens_as_token_ids": True, **body}
        said = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                answer = httpx.post(f"{self.url}/v1/completions", json=sent, headers=headers, timeout=self.seconds)
            except httpx.TransportError as error:
                said = str(error) or type(error).__name__
                continue
            if answer.status_code == 200:
                return _first_choice(answer, self.url)
            said = f"status {answer.status_code}: {answer.text[:200]}"
            if answer.status_code not in BUSY:
                break
        raise SignalError(f"{self.url}/v1/completions does not answer ({said}). Check the address, model and key.")


def _first_choice(answer: Any, url: str) -> Mapping[str, Any]:
    try:
        said = answer.json()
        return {"all_tokens": (said.get("__verbose") or {}).get("tokens"), **said["choices"][0]}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise SignalError(f"{url} answered, but not in the form of /v1/completions: {answer.text[:200]}") from None


def _documents(batch: Batch) -> list[tuple[int, int, list[int]]]:
    """(row, first position, ids) of every document of packed rows; the last label ends its ids.

    Raises DataError where a label is not the next token: a server scores what stands in the text.
    """
    tokens: Tensor = batch.inputs["tokens"]  # type: ignore[assignment]
    positions: Tensor = batch.inputs["positions"]  # type: ignore[assignment]
    labels = torch.full_like(tokens, UNLABELLED) if batch.labels is None else batch.labels
    held = batch.extra.get("documents", torch.zeros_like(tokens)) >= 0
    found = []
    for row in range(len(batch)):
        starts = [*(positions[row] == 0).nonzero().flatten().tolist(), tokens.shape[1]]
        for start, end in pairwise(starts):
            if not held[row, start]:
                continue
            ids, ours = tokens[row, start:end].tolist(), labels[row, start:end].tolist()
            if any(label not in (UNLABELLED, token) for label, token in zip(ours, ids[1:], strict=False)):
                raise DataError(f"example {batch.ids[row]!r} has labels that are not its next tokens.")
            found.append((row, start, [*ids, ours[-1]] if ours[-1] != UNLABELLED else ids))
    return found


def _places(choice: Mapping[str, Any], url: str) -> list[Parsed]:
    """Token -> log-probability at every place of the prompt, in either of vLLM's forms."""
    native = choice.get("prompt_logprobs")
    if native:
        return [{int(token): float(said["logprob"]) for token, said in (place or {}).items()} for place in native]
    echoed = choice.get("logprobs") or {}
    tops = echoed.get("top_logprobs")
    if not tops:
        raise SignalError(
            f"{url} answers, but says nothing of how likely the prompt's tokens are (no prompt_logprobs, no echoed "
            "logprobs): llama.cpp and hosted APIs never do. Score with vLLM, or with a live teacher."
        )
    names = [name for place in tops for name in (place or {})]
    if not all(name.startswith(MARK) for name in names):
        raise SignalError(
            f"{url} names tokens by their text ({names[0]!r}), which is not unique. Use a server that knows "
            "return_tokens_as_token_ids (vLLM)."
        )
    return [{int(name.removeprefix(MARK)): float(said) for name, said in (place or {}).items()} for place in tops]


def _written(choice: Mapping[str, Any], ends: set[int], url: str) -> Written:
    """The tokens of an answer: llama.cpp's form (content, with ids) or vLLM's (tokens named by id).

    llama.cpp leaves out of ``content`` what ends within a character; all its tokens stand in its verbose answer. How
    likely such a token was is not known: NaN.
    """
    said = choice.get("logprobs") or {}
    if "content" in said:
        shown = [(each["id"], each["logprob"]) for each in said["content"]]
        tokens, log_probs = [], []
        for token in choice.get("all_tokens") or ():
            tokens.append(token)
            log_probs.append(shown.pop(0)[1] if shown and shown[0][0] == token else math.nan)
        tokens += [token for token, _ in shown]  # all of them where it was not verbose; else the end mark
        log_probs += [value for _, value in shown]
    elif all(str(name).startswith(MARK) for name in said.get("tokens", [""])):
        tokens, log_probs = [int(name.removeprefix(MARK)) for name in said["tokens"]], said["token_logprobs"]
    else:
        raise SignalError(f"{url} wrote, but gives no ids and log-probabilities of what it wrote: no rollout.")
    stop = next((number + 1 for number, token in enumerate(tokens) if token in ends), len(tokens))
    if not stop:
        raise SignalError(f"{url} wrote nothing, not even an end mark: no rollout.")
    return Written(tuple(tokens[:stop]), tuple(map(float, log_probs[:stop])), tokens[stop - 1] in ends)

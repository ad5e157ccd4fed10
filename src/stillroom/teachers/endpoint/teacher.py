"""An endpoint as a teacher: ``Batch -> Signal`` like any other, from answers paid once and kept in a journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from stillroom import settings
from stillroom.digests import json_digest
from stillroom.errors import SignalError
from stillroom.language.prompts import Prompt
from stillroom.progress import Step, bar
from stillroom.teachers.endpoint.asking import Terms, ask
from stillroom.teachers.endpoint.client import Server
from stillroom.teachers.endpoint.journal import Request, Totals, opened
from stillroom.teachers.endpoint.money import Outlook, Price
from stillroom.teachers.endpoint.pace import Limits
from stillroom.teachers.endpoint.reading import Choice, Label, Reading
from stillroom.teachers.endpoint.words import first_tokens, spellings
from stillroom.types import Batch, Examples, Identity, Signal

SAMPLE = 16  # examples that an outlook is measured on
SIDES = ("input", "output")
BLOCK = 512  # examples whose prompts are made at a time


@dataclass(frozen=True, eq=False)
class Endpoint:
    """See ``making.endpoint``. Answers a batch from the journal; what is not there is asked first."""

    server: Server
    model: str
    prompt: Prompt
    reading: Reading
    decoding: Mapping[str, Any]
    route: Literal["chat", "completions"] = "chat"
    samples: int = 1
    seed: int = 0
    attempts: int = 3
    warmer: float = 0.7  # the temperature of second attempts at an answer that cannot be used, at least
    limits: Limits = field(default_factory=Limits)
    price: Price = field(default_factory=Price)
    budget: float | None = None
    journal: Path = Path("runs/journal.sqlite")
    classes: tuple[str, ...] | None = None
    licence: str = "unknown"
    progress: bool = field(default=True, repr=False)

    answers_from_disk = True  # how fast the journal is read says nothing of how fast the server answers

    @cached_property
    def identity(self) -> Identity:
        """Model, server, and in ``template`` the digest of all that decides a question: its weights nobody knows."""
        return Identity(
            self.model, kind="endpoint", licence=self.licence, route="own-account", source=self.server.name,
            classes=self.classes if isinstance(self.reading, Choice | Label) else None, template=self._template,
        )  # fmt: skip

    @cached_property
    def _template(self) -> str:
        asked = {"prompt": self.prompt, "reading": self.reading, "decoding": self.decoding, "route": self.route}
        asked |= {"samples": self.samples, "seed": self.seed, "attempts": self.attempts, "warmer": self.warmer}
        return json_digest(settings.describe(asked))

    @cached_property
    def account(self) -> str:
        """What the budget is about, in the journal: this model at this server with this prompt."""
        return json_digest({"server": self.server.name, "model": self.model, "template": self._template})

    def __call__(self, batch: Batch) -> Signal:
        """Raises SignalError, naming the example, for one that was set aside; what ``asking.ask`` raises."""
        found = self._outcomes(batch, lambda amount=1, note="": None)
        for name, draws in zip(batch.ids, found, strict=True):
            if isinstance(draws, str):
                raise SignalError(
                    f"example {name!r} has no answer that can be used: {draws}. In a run, such rows are set aside and "
                    "counted; in code of your own, leave out what teacher.ask_ahead(examples) names."
                )
        return self._reading.signal(found)  # type: ignore[arg-type]

    def ask_ahead(self, examples: Examples, progress: bool | None = None) -> dict[str, str]:
        """Ask about all examples, as many at a time as is allowed. Returns the ids that are set aside, with the reason.

        Interrupted or out of budget, it goes on where it stopped when called again.
        """
        aside: dict[str, str] = {}
        shown = self.progress if progress is None else progress
        with bar(f"asking {self.model}", len(examples) * self.samples, shown=shown) as step:
            for start in range(0, len(examples), BLOCK):
                batch = examples.batch(range(start, min(start + BLOCK, len(examples))), None)
                found = self._outcomes(batch, step)
                aside |= {name: why for name, why in zip(batch.ids, found, strict=True) if isinstance(why, str)}
        return aside

    def outlook(self, examples: Examples, sample: int = SAMPLE) -> Outlook:
        """What asking about ``examples`` will take: tokens, money and time, from a few that it asks, spread evenly."""
        rows = list(range(0, len(examples), max(1, -(-len(examples) // sample))))
        seen = examples.batch(rows, None)
        self._outcomes(seen, lambda amount=1, note="": None)
        missing = 0
        with opened(self.journal) as journal:
            for start in range(0, len(examples), BLOCK):
                batch = examples.batch(range(start, min(start + BLOCK, len(examples))), None)
                asked = [request for row in range(len(batch)) for request in self._first(batch, row)]
                missing += len(journal.unanswered(asked))
            spent = journal.totals(self.account)
            known = spent
            if not spent.requests:  # this sample was paid under another account: with another reading, say
                said = list(
                    journal.answers([r.digest for row in range(len(seen)) for r in self._first(seen, row)]).values()
                )
                known = Totals(len(said), *(sum(one.get(f"{side}_tokens") or 0 for one in said) for side in SIDES))
        each = max(known.requests, 1)
        tokens = known.input_tokens / each * missing, known.output_tokens / each * missing
        return Outlook(
            len(examples), missing, spent.requests, *tokens, self.price.of(*tokens), self.cost(spent),
            self._seconds(missing, known.seconds / each, sum(tokens)), self.budget, self.price,
        )  # fmt: skip

    def totals(self) -> Totals:
        """What this teacher's answers cost so far, as its journal has it."""
        with opened(self.journal) as journal:
            return journal.totals(self.account)

    def cost(self, totals: Totals) -> float:
        """In the price's currency."""
        return self.price.of(totals.input_tokens, totals.output_tokens)

    def _seconds(self, requests: int, each: float, tokens: float) -> float:
        """The slowest of what the server was seen to bear and the rates that the recipe allows."""
        limits = self.limits
        by_rate = 60 * requests / limits.requests_per_minute if limits.requests_per_minute else 0.0
        by_tokens = 60 * tokens / limits.tokens_per_minute if limits.tokens_per_minute else 0.0
        return max(requests * each / limits.in_flight, by_rate, by_tokens)

    def _outcomes(self, batch: Batch, step: Step) -> list[list[Any] | str]:
        """Of each example the answers, one for each draw, or why there are none that can be used."""
        slots = [(row, draw) for row in range(len(batch)) for draw in range(self.samples)]
        messages = [self.prompt.fill(batch, row, self._known) for row in range(len(batch))]
        found: dict[tuple[int, int], Any] = {}
        why: dict[int, str] = {}
        for attempt in range(self.attempts):
            asked = {slot: self._request(messages[slot[0]], slot[1], attempt) for slot in slots}
            answers = self._answers(list(asked.values()), step if attempt == 0 else lambda amount=1, note="": None)
            left = []
            for slot, request in asked.items():
                said = answers[request.digest]
                problem = said.get("refused") or self._problem(said)
                if problem is None:
                    found[slot] = said
                    continue
                why[slot[0]] = problem
                if "refused" not in said:
                    left.append(slot)
            slots = left
            if not slots:
                break
        rows = [[found.get((row, draw)) for draw in range(self.samples)] for row in range(len(batch))]
        return [why[row] if None in draws else draws for row, draws in enumerate(rows)]

    def _answers(self, requests: Sequence[Request], step: Step) -> dict[str, Any]:
        """From the journal, after asking for what is not there."""
        with opened(self.journal) as journal:
            wanted = {request.digest for request in requests}
            there = len(wanted) - len({request.digest for request in journal.unanswered(requests)})
            step(there + len(requests) - len(wanted))
            ask(self._terms, journal, requests, step)
            return journal.answers(list(wanted))

    def _problem(self, said: Mapping[str, Any]) -> str | None:
        self._reading.need(said, f"{self.model} at {self.server.name}")
        return self._reading.problem(said)

    def _request(self, messages: list[dict[str, str]], draw: int, attempt: int) -> Request:
        decoding = dict(self.decoding)
        number = draw + attempt * self.samples
        if attempt and decoding.get("temperature") is not None:  # the same greedy answer again would only cost money
            decoding["temperature"] = max(self.warmer, decoding["temperature"])
        if decoding.get("temperature") or number:
            decoding["seed"] = self.seed + number
        prompt: dict[str, Any] = {"messages": messages}
        if self.route == "completions":
            prompt = {"prompt": messages[0]["content"]}
        return Request(self.server.name, self.route, self.model, prompt, decoding, number, self.account)

    def _first(self, batch: Batch, row: int) -> list[Request]:
        messages = self.prompt.fill(batch, row, self._known)
        return [self._request(messages, draw, 0) for draw in range(self.samples)]

    @property
    def _known(self) -> dict[str, Any]:
        """What a template sees besides the example's columns."""
        words = getattr(self.reading, "words", ())
        classes = self.classes or ()
        return {"classes": list(classes), "words": dict(zip(classes, words, strict=False)) if classes else list(words)}

    @property
    def _terms(self) -> Terms:
        return Terms(self.server, self.limits, self.price, self.budget, self.decoding.get("max_tokens"), self.account)

    @cached_property
    def _reading(self) -> Reading:
        """The reading; of first tokens, with how the server cuts the classes' words."""
        if not isinstance(self.reading, Choice):
            return self.reading
        asked = {
            form: Request(self.server.name, "tokenize", self.model, {"content": form, "prompt": form}, dict(TOKENIZE))
            for word in self.reading.words
            for form in spellings(word)
        }
        answers = self._answers(list(asked.values()), lambda amount=1, note="": None)
        told = {form: answers[request.digest].get("pieces") for form, request in asked.items()}
        return dataclasses.replace(self.reading, pieces=first_tokens(self.reading.words, told))


# for llama.cpp (content, with_pieces, add_special) and vLLM (prompt, return_token_strs, add_special_tokens) in one
TOKENIZE = {"with_pieces": True, "add_special": False, "return_token_strs": True, "add_special_tokens": False}

"""How many questions are under way, and how fast new ones begin: what the recipe allows and the server bears.

Additive increase, multiplicative decrease, as in TCP (Chiu and Jain 1989): every answer widens the window by 1 /
window, a server that has too much to do halves it, once for all questions that were under way then.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stillroom.errors import UsageError

FIRST = 4.0  # questions at once, to begin with
LONGEST = 120.0  # seconds between two attempts, at most, unless the server names a longer time
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Limits:
    """What may be asked of a server. Rates are per minute; None: as many as it bears.

    ``seconds``: to wait for one answer, to its last byte; ``tries`` of a question to a server that does not answer it.
    Raises UsageError for a limit below 1.
    """

    in_flight: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    seconds: float = 120.0
    tries: int = 8
    backoff: float = 1.0  # seconds before the second attempt, doubled before each further one, half of it random

    def __post_init__(self) -> None:
        for name in ("in_flight", "requests_per_minute", "tokens_per_minute", "tries"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise UsageError(f"limits.{name}={value!r} must be 1 or more.")
        if not self.seconds > 0 or not self.backoff >= 0:
            raise UsageError(
                f"limits: seconds={self.seconds!r} must be more than 0, backoff={self.backoff!r} 0 or more."
            )


@dataclass
class Pace:
    """Lets questions begin. ``enter`` before each attempt, then ``leave`` with what came of it."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    window: float = field(init=False)
    flying: int = field(default=0, init=False)
    most: int = field(default=0, init=False)  # that were under way at once
    halved: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.window = min(FIRST, float(self.limits.in_flight))
        self._changed = asyncio.Event()
        self._next_request = self._next_token = self._resume = self._last_halved = float("-inf")

    async def enter(self, tokens: float) -> float:
        """Wait for a place and for the rates. ``tokens`` that the question will about take. Returns when it began."""
        while True:
            now = self.clock()
            wait = max(self._resume, self._next_request, self._next_token) - now
            if self.flying < max(1, int(self.window)) and wait <= 0:
                break
            self._changed.clear()
            try:
                async with asyncio.timeout(max(wait, 0.001) if self.flying < int(self.window) else None):
                    await self._changed.wait()
            except TimeoutError:
                continue
        limits = self.limits
        # evenly spaced: a burst of a minute's requests at once would be within the rate only on average
        if limits.requests_per_minute:
            self._next_request = now + 60.0 / limits.requests_per_minute
        if limits.tokens_per_minute:
            self._next_token = now + 60.0 * tokens / limits.tokens_per_minute
        self.flying += 1
        self.most = max(self.most, self.flying)
        return now

    def leave(self, began: float, *, answered: bool, crowded: bool = False, after: float | None = None) -> None:
        """A question is over. ``after``: seconds in which the server wants to hear nothing."""
        self.flying -= 1
        if answered:
            self.window = min(float(self.limits.in_flight), self.window + 1.0 / self.window)
        elif crowded and began > self._last_halved:  # those that began before the cut say nothing new
            self.window, self._last_halved = max(1.0, self.window / 2), self.clock()
            self.halved += 1
        if after:
            self._resume = max(self._resume, self.clock() + after)
        self._changed.set()

    def heed(self, headers: Mapping[str, str]) -> None:
        """Pause until the server's own limits begin anew, when it says that nothing is left of them (x-ratelimit-*)."""
        for what in ("requests", "tokens"):
            left, reset = headers.get(f"x-ratelimit-remaining-{what}"), headers.get(f"x-ratelimit-reset-{what}")
            seconds = as_seconds(reset or "")
            if seconds is None or not left or not left.strip().lstrip("-").isdigit() or int(left) > self._reserve(what):
                continue
            self._resume = max(self._resume, self.clock() + seconds)

    def _reserve(self, what: str) -> int:
        """Questions under way are not in the server's count yet when it says what is left."""
        return self.flying if what == "requests" else 0


def as_seconds(written: str) -> float | None:
    """'1s', '6m0s', '20ms', '2.5' -> seconds; None for what is no duration."""
    text = written.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h|d))+", text):
        return None
    return sum(float(number) * UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|[smhd])", text))


def backoff(attempt: int, unit: float, jitter: float) -> float:
    """Seconds before attempt 1, 2, ...: half of unit (1, 2, 4, ...), and a random share (``jitter``) of the rest."""
    return min(LONGEST, unit * 2.0 ** (attempt - 1)) * (0.5 + 0.5 * jitter)

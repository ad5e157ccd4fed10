"""Asking: every request that the journal has no answer to, several at a time, until all are answered or nothing can be.

An answer is in the journal before anybody sees it. What ends the asking (a refused key, the budget, Ctrl-C) ends it at
the boundary of a request: what is under way is waited for and kept, since it is paid.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stillroom.errors import BudgetError, EndpointError
from stillroom.progress import Step
from stillroom.teachers.endpoint.client import AskAgain, Client, Closed, NeverAnswers, Reply, Server
from stillroom.teachers.endpoint.journal import Journal, Request
from stillroom.teachers.endpoint.money import Price, Purse
from stillroom.teachers.endpoint.pace import Limits, Pace, backoff

GRACE = 30.0  # seconds that a lease outlasts what is waited for
LOOK = 0.2  # seconds between two looks at what another process asks


@dataclass(frozen=True)
class Terms:
    """Whom to ask, how fast, and for how much. ``longest``: tokens of an answer, at most."""

    server: Server
    limits: Limits
    price: Price
    budget: float | None
    longest: int | None
    teacher: str  # whose spending the budget is about


@dataclass
class Tally:
    """What became of the attempts of one round."""

    answered: int = 0
    again: int = 0
    refused: int = 0
    most_in_flight: int = 0
    halved: int = 0


def ask(terms: Terms, journal: Journal, requests: Sequence[Request], step: Step) -> Tally:
    """Have every request answered in the journal. ``step`` is told of each one.

    Raises EndpointError for a server that refuses everything or stays silent, BudgetError at the budget's end, and
    KeyboardInterrupt after Ctrl-C, when what was under way is kept.
    """
    round_ = _Round(terms, journal, step)
    wanted = list({request.digest: request for request in requests}.values())
    missing = journal.unanswered(wanted)
    if missing:
        _run(lambda: round_.all(missing))
    if round_.failure is not None:
        raise round_.failure
    return round_.tally


def _run(start: Callable[[], Any]) -> None:
    """Run to the end, also from within a notebook, whose own loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(start())
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(start())).result()


class _Round:
    """One asking: what is claimed, under way, and why it ends."""

    def __init__(self, terms: Terms, journal: Journal, step: Step) -> None:
        self.terms, self.journal, self.step = terms, journal, step
        self.tally = Tally()
        self.purse = Purse(terms.price, terms.budget, journal.totals(terms.teacher), terms.longest)
        self.began, self.ours = time.monotonic(), deque[Request]()
        self.failure: BaseException | None = None
        self.short = False  # near the budget's end one at a time: what others may cost is known then
        self.sent: set[asyncio.Task[None]] = set()  # that are at the server

    async def all(self, missing: Sequence[Request]) -> None:
        self.pace = Pace(self.terms.limits)
        waiting, others, tasks = deque(missing), list[Request](), set[asyncio.Task[None]]()
        async with Client(self.terms.server, self.terms.limits.seconds) as client:
            with self._interruptible(tasks):
                while tasks or (self.failure is None and (self.ours or waiting or others)):
                    self._claim(waiting, others)
                    together = 1 if self.short else self.terms.limits.in_flight
                    while self.ours and self.failure is None and len(tasks) < together:
                        tasks.add(asyncio.create_task(self._one(client, self.ours.popleft())))
                    if tasks:
                        done, _ = await asyncio.wait(tasks, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
                        tasks -= done
                        self._over(done, tasks)
                    elif others and not waiting:
                        await self._see_to(others, waiting)
        self.journal.release(self.ours)
        self.tally.most_in_flight, self.tally.halved = self.pace.most, self.pace.halved

    def _claim(self, waiting: deque[Request], others: list[Request]) -> None:
        """Take as many as can be under way; what others ask or have answered is seen to later."""
        if self.ours or not waiting or self.failure is not None:
            return
        block = [waiting.popleft() for _ in range(min(len(waiting), self.terms.limits.in_flight))]
        claimed = self.journal.claim(block, self._lease(0.0), len(block))
        taken = {request.digest for request in claimed}
        self.ours.extend(claimed)
        others.extend(request for request in block if request.digest not in taken)

    async def _see_to(self, others: list[Request], waiting: deque[Request]) -> None:
        """Other processes' requests: answered by now, or to be claimed when their lease is over."""
        left = self.journal.unanswered(others)
        if len(left) < len(others):
            self.step(len(others) - len(left))
        others.clear()
        waiting.extend(left)
        if left:
            await asyncio.sleep(LOOK)

    def _over(self, done: set[asyncio.Task[None]], tasks: set[asyncio.Task[None]]) -> None:
        """The first failure ends the asking: what is not at the server yet is called back."""
        failed = [task.exception() for task in done if not task.cancelled() and task.exception() is not None]
        if failed and isinstance(failed[0], BudgetError) and not self.short:
            self.short = True
        elif failed and self.failure is None:
            self._stop(failed[0], tasks)

    def _stop(self, why: BaseException | None, tasks: set[asyncio.Task[None]]) -> None:
        self.failure = why
        for task in tasks - self.sent:
            task.cancel()

    @contextmanager
    def _interruptible(self, tasks: set[asyncio.Task[None]]) -> Any:
        """The first Ctrl-C waits for what is under way, the second does not."""

        def interrupted() -> None:
            if isinstance(self.failure, KeyboardInterrupt):
                self.sent.clear()
            self._stop(KeyboardInterrupt(), tasks)

        loop = asyncio.get_running_loop()
        # Loops of Windows have no signal handlers: there Ctrl-C ends at once, with what is in the journal.
        ours = sys.platform != "win32" and threading.current_thread() is threading.main_thread()
        if ours:
            loop.add_signal_handler(signal.SIGINT, interrupted)
        try:
            yield
        finally:
            if ours:
                loop.remove_signal_handler(signal.SIGINT)

    async def _one(self, client: Client, request: Request) -> None:
        """One request, as often as it takes."""
        tries, again = self.terms.limits.tries, None
        try:
            for attempt in range(tries):
                if attempt:
                    await asyncio.sleep(backoff(attempt, self.terms.limits.backoff, random.random()))
                again = await self._attempt(client, request)
                if again is None:
                    return
                self.tally.again += 1
            raise EndpointError(
                f"{self.terms.server.name} did not answer in {tries} attempts; the last time: {again}. What was "
                "answered is in the journal: the same command goes on from there."
            )
        except BaseException:
            self.ours.append(request)  # not answered: its lease is given up at the end
            raise

    async def _attempt(self, client: Client, request: Request) -> AskAgain | None:
        """One attempt; None when there is an answer, in the journal by then."""
        taking = self.purse.most(request.characters)
        began = await self.pace.enter(sum(taking))
        answered, paid, again, reserved = False, False, None, 0.0
        task = asyncio.current_task()
        assert task is not None
        try:
            reserved = self.purse.reserve(request.characters)
            self.journal.renew(request.digest, self._lease(0.0))
            self.sent.add(task)
            reply = await client.ask(request.route, request.body)
            self._keep(request, reply, reserved, time.monotonic() - began)
            answered = paid = True
            self.pace.heed(reply.headers)
        except AskAgain as error:
            again = error
            self.journal.renew(request.digest, self._lease(error.after or 0.0))
        except NeverAnswers as error:
            self.journal.settle(request, {"refused": str(error)}, 0.0)
            self.tally.refused += 1
            self.step(1)
            answered = True
        except Closed as error:
            raise EndpointError(
                f"{self.terms.server.name} refuses to answer ({error}). Check the key, its quota, the address "
                "and the model."
            ) from None
        finally:
            self.sent.discard(task)
            if not paid:
                self.purse.give_back(reserved)
            crowded, after = (again.crowded, again.after) if again else (False, None)
            self.pace.leave(began, answered=answered, crowded=crowded, after=after)
        return again

    def _keep(self, request: Request, reply: Reply, reserved: float, seconds: float) -> None:
        """Into the journal first. An answer that another question had already is no answer to this one."""
        said = reply.said
        if said.get("id") and self.journal.knows(said["id"], request.digest):
            raise AskAgain(f"answer {said['id']} came twice, for two questions")
        self.journal.settle(request, said, seconds)
        self.purse.pay(reserved, request.characters, said.get("input_tokens", 0), said.get("output_tokens", 0), seconds)
        self.tally.answered += 1
        rate = self.tally.answered / max(time.monotonic() - self.began, 1e-3)
        self.step(1, f"{self.terms.price.shown(self.purse.cost)}, {rate:.1f}/s, {self.pace.flying} at once")

    def _lease(self, waited: float) -> float:
        return self.terms.limits.seconds + waited + GRACE

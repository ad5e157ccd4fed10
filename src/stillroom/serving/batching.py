"""Dynamic batching: questions that wait together are answered together, in one thread beside the event loop.

Nothing is dropped: where more come than can be answered, they wait at a queue of bounded length, and so do their
connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Answering = Callable[[Sequence[Any]], Sequence[Any]]  # questions -> their answers, in order
STOP: Any = None


class Batcher:
    """Answers questions in batches of at most ``most``, after waiting for others at most ``wait`` seconds.

    ``seen(size)`` is told of every batch. When a batch fails, its questions are asked one by one, so that a question
    that cannot be answered takes no other with it. Made and used within one event loop.
    """

    def __init__(
        self, answer: Answering, most: int = 64, wait: float = 0.002, seen: Callable[[int], None] = lambda size: None
    ) -> None:
        self.answer, self.most, self.wait, self.seen = answer, most, wait, seen
        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=4 * most)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._work = asyncio.get_running_loop().create_task(self._answer_all())

    async def ask(self, question: Any) -> Any:
        """The answer, or the error that answering this question raised. Waits while the queue is full."""
        told = asyncio.get_running_loop().create_future()
        await self._queue.put((question, told))
        return await told

    async def close(self) -> None:
        """Answer what waits, then end."""
        await self._queue.put(STOP)
        await self._work
        self._thread.shutdown()

    async def _answer_all(self) -> None:
        ended = False
        while not ended:
            waiting = [await self._queue.get()]
            if waiting[0] is STOP:
                return
            if self.wait > 0 and self._queue.qsize() + 1 < self.most:
                await asyncio.sleep(self.wait)
            while len(waiting) < self.most and not self._queue.empty():
                found = self._queue.get_nowait()
                if found is STOP:
                    ended = True
                    break
                waiting.append(found)
            # whoever hung up is not answered
            await self._answer_some([(question, told) for question, told in waiting if not told.done()])

    async def _answer_some(self, waiting: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        if not waiting:
            return
        self.seen(len(waiting))
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self.answer, [question for question, _ in waiting])
        except Exception as error:
            if len(waiting) > 1:
                for one in waiting:
                    await self._answer_some([one])
            elif not waiting[0][1].done():
                waiting[0][1].set_exception(error)
            return
        for (_, told), found in zip(waiting, answers, strict=True):
            if not told.done():
                told.set_result(found)

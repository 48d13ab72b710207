"""Concurrent requests as batches: what waits, what is searched for together, and what happens to it."""

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from .metrics import Metrics
from .requests import Limits, RecommendRequest
from .worker_pool import WorkerDied, WorkerPool

logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why a request cannot be answered now; it may be sent again."""


@dataclass(eq=False)
class Waiting:
    """A request in the queue.

    Args:
        answer: its future answer.
        since: [s] of the clock that only rises.
        tried: whether a worker died while it had the request.
    """

    request: RecommendRequest
    answer: asyncio.Future
    since: float
    tried: bool = False

    def goes_with(self, other: "Waiting") -> bool:
        """Whether both may be searched for together. A request that a worker died of is tried again alone."""
        group = self.request.group
        return group is not None and group == other.request.group and not (self.tried or other.tried)


class Batcher:
    """The queue before the workers, of which each takes the oldest request with those that may go with it.

    Args:
        max_batch: histories searched for together.
        wait_seconds: that a worker waits for more of them, after a request came and it was free, as long as fewer wait
            than did when it finished its batch, those of the batch included: who has an answer asks again.
    """

    def __init__(self, pool: WorkerPool, metrics: Metrics, limits: Limits, max_batch: int, wait_seconds: float):
        self._pool, self._metrics, self._limits = pool, metrics, limits
        self._max_batch, self._wait_seconds = max_batch, wait_seconds
        self.queue: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        self._gathering = asyncio.Lock()
        self._expected = 1

    async def answer(self, request: RecommendRequest) -> dict[str, Any]:
        """A worker's answer.

        Raises:
            Unavailable: the queue is full, the time is out, or workers died of the request.
        """
        if len(self.queue) >= self._limits.waiting:
            raise Unavailable(f"{len(self.queue)} requests wait already: try again.")
        waiting = Waiting(request, asyncio.get_running_loop().create_future(), time.monotonic())
        self.queue.append(waiting)
        self._arrived.set()
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await waiting.answer
        except TimeoutError:
            raise Unavailable(f"no answer within {self._limits.seconds:g} s: try again, or ask for less.") from None
        finally:
            if waiting in self.queue:
                self.queue.remove(waiting)

    async def serve(self, place: int) -> None:
        """Gives batches to the worker of a place, for as long as the server runs."""
        while True:
            await self._pool.worker(place)  # a request waits in the queue, rather than for a dead worker
            batch = await self._next_batch()
            worker, start = await self._pool.worker(place), time.monotonic()
            try:
                requests = [waiting.request for waiting in batch]
                answers = await worker.answer(requests, self._limits.seconds)
            except WorkerDied:
                self._return(batch)
                continue
            except Exception as error:  # a place that stops serving would be worse than whatever it is
                logger.exception("A batch failed.")
                answers = [{"status": 500, "error": f"{type(error).__name__}: {error}"}] * len(batch)
            self._metrics.batch_seconds.observe(time.monotonic() - start)
            self._metrics.batch_histories.observe(sum(len(request.rows) for request in requests))
            self._expected = len(batch) + len(self.queue)
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)

    def _return(self, batch: list[Waiting]) -> None:
        """Puts what a dead worker had back to the front of the queue, once."""
        for waiting in reversed([waiting for waiting in batch if not waiting.answer.done()]):
            if waiting.tried:
                waiting.answer.set_exception(Unavailable("two workers died with this request: try again later."))
                continue
            waiting.tried = True
            self.queue.appendleft(waiting)
        if self.queue:
            self._arrived.set()

    async def _next_batch(self) -> list[Waiting]:
        """Takes the oldest request from the queue, and those that go with it, as soon as they are as many as may be or
        are expected, or both it and the worker have waited."""
        free = time.monotonic()
        async with self._gathering:
            while True:
                if not self.queue:
                    self._arrived.clear()
                    await self._arrived.wait()
                    continue
                batch, full = self._gathered()
                left = max(batch[0].since, free) + self._wait_seconds - time.monotonic()
                if full or len(self.queue) >= self._expected or left <= 0:
                    break
                self._arrived.clear()
                try:
                    async with asyncio.timeout(left):
                        await self._arrived.wait()
                except TimeoutError:
                    pass
            for waiting in batch:
                self.queue.remove(waiting)
            return batch

    def _gathered(self) -> tuple[list[Waiting], bool]:
        """The oldest request with those that go with it, and whether waiting for more is of no use."""
        first = self.queue[0]
        batch, histories = [first], len(first.request.rows)
        for waiting in list(self.queue)[1:]:
            if not first.goes_with(waiting):
                continue
            if histories + len(waiting.request.rows) > self._max_batch:
                return batch, True
            batch.append(waiting)
            histories += len(waiting.request.rows)
        return batch, histories >= self._max_batch or not first.goes_with(first)

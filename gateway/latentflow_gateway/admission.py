"""Admission of requests: a bounded number runs at a time, a bounded number is queued, and any further one is refused."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from latentflow.errors import OverloadedError
from latentflow.internal.metrics import Instruments


class Admission:
    """The gateway's queue.

    Args:
        max_running: Requests that run at a time.
        max_queued: Admitted requests that do not run yet.
    """

    def __init__(self, *, max_running: int, max_queued: int, metrics: Instruments) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._max_running = max_running
        self._max_queued = max_queued
        self._admitted = 0
        self._mean_seconds = 1.0
        self._metrics = metrics

    @property
    def queued(self) -> int:
        """Admitted requests beyond those that may run."""
        return max(0, self._admitted - self._max_running)

    @contextlib.contextmanager
    def admit(self, workflow: str) -> Iterator[None]:
        """Counts a request as admitted while entered, from before its models are awake until it has ended.

        OverloadedError where the queue is full; its `retry_after` is when half of the queue should be gone.
        """
        if self._admitted >= self._max_running + self._max_queued:
            delay = retry_delay(mean=self._mean_seconds, ahead=self.queued, running=self._max_running)
            raise OverloadedError(
                f"The gateway's queue is full ({self.queued} of {self._max_queued} requests queued); try again later.",
                retry_after=max(0.1, delay),
            )
        in_flight = self._metrics.of("latentflow_gateway_in_flight", workflow=workflow)
        self._admitted += 1
        in_flight.inc()
        try:
            yield
        finally:
            self._admitted -= 1
            in_flight.dec()

    @contextlib.asynccontextmanager
    async def slot(self, workflow: str) -> AsyncIterator[None]:
        """A running slot for an admitted request; waits until one is free."""
        waiting = self._metrics.of("latentflow_gateway_queue_depth", workflow=workflow)
        waiting.inc()
        try:
            await self._slots.acquire()
        finally:
            waiting.dec()
        started = time.monotonic()
        try:
            yield
        finally:
            self._slots.release()
            self._mean_seconds = 0.9 * self._mean_seconds + 0.1 * (time.monotonic() - started)


def retry_delay(*, mean: float, ahead: int, running: int) -> float:
    """Seconds until half of `ahead` queued requests have ended, with `running` at a time and `mean` seconds for each."""
    return mean * (ahead / 2) / running

"""Who may come in: a bounded number of requests at work, a bounded queue before them, an honest refusal after that."""

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
        max_running: Requests at work at a time.
        max_queued: Requests that may wait for that.
    """

    def __init__(self, *, max_running: int, max_queued: int, metrics: Instruments) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._max_running = max_running
        self._max_queued = max_queued
        self._present = 0
        self._mean = 1.0
        self._metrics = metrics

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return max(0, self._present - self._max_running)

    @contextlib.contextmanager
    def present(self, workflow: str) -> Iterator[None]:
        """A place in the gateway, before its models are awake and it is at work. OverloadedError when there is none.

        The error says when there should be room.
        """
        if self._present >= self._max_running + self._max_queued:
            raise OverloadedError(
                f"The gateway's queue is full ({self.queued} of {self._max_queued} waiting); try again later.",
                retry_after=max(0.1, retry_delay(mean=self._mean, ahead=self.queued, running=self._max_running)),
            )
        in_flight = self._metrics.of("latentflow_gateway_in_flight", workflow=workflow)
        self._present += 1
        in_flight.inc()
        try:
            yield
        finally:
            self._present -= 1
            in_flight.dec()

    @contextlib.asynccontextmanager
    async def slot(self, workflow: str) -> AsyncIterator[None]:
        """A place at work, for who is present; waits for it."""
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
            self._mean = 0.9 * self._mean + 0.1 * (time.monotonic() - started)


def retry_delay(*, mean: float, ahead: int, running: int) -> float:
    """Seconds until half of those ahead are through, `running` of them at a time, each taking `mean` seconds."""
    return mean * (ahead / 2) / running

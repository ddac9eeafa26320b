"""A work queue as in the controllers of Kubernetes: it processes a key in one worker at a time, and retries with backoff.

A key that is added while it is processed is processed again. Many events about one object lead to one pass over its
present state, so that a second delivery of an event costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import structlog

Key = TypeVar("Key", bound=Hashable)
_log = structlog.get_logger()
_FIRST_SECONDS, _MOST_SECONDS = 0.2, 60.0


class WorkQueue(Generic[Key]):
    """Calls `work` with each key, and again with backoff if it raises.

    Args:
        work: Processes a key from the present state alone.
        workers: Keys that are processed at the same time.
    """

    def __init__(self, work: Callable[[Key], Awaitable[None]], *, workers: int) -> None:
        self._work = work
        self._workers = workers
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._running: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._open = asyncio.Event()
        self._settled = asyncio.Event()

    def add(self, key: Key) -> None:
        """Adds a key."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def add_later(self, key: Key, seconds: float) -> None:
        """Adds a key after some seconds, unless it is processed before."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self.add, key)

    def open(self) -> None:
        """Starts the processing; before that, keys are only collected."""
        self._open.set()

    async def idle(self) -> None:
        """Waits until no key is queued or processed. Keys that wait for a retry do not count."""
        while self._queued or self._running:
            self._settled.clear()
            await self._settled.wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the workers while entered."""
        tasks = [asyncio.create_task(self._run()) for _ in range(self._workers)]
        try:
            yield
        finally:
            for timer in self._timers.values():
                timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        await self._open.wait()
        while True:
            key = await self._ready.get()
            self._queued.discard(key)
            self._running.add(key)
            if timer := self._timers.pop(key, None):
                timer.cancel()
            try:
                await self._work(key)
                self._failures.pop(key, None)
            except Exception as error:
                self._retry(key, error)
            finally:
                self._running.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)
                self._settled.set()

    def _retry(self, key: Key, error: Exception) -> None:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        seconds = min(_MOST_SECONDS, _FIRST_SECONDS * 2 ** (failures - 1))
        _log.warning("reconciliation failed; retrying", key=key, seconds=seconds, failures=failures, error=str(error))
        self.add_later(key, seconds)

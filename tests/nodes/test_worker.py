"""The thread in which a role's forward passes run, and what of its queue counts as waiting requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest
from latentflow.errors import OverloadedError
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.load import Load, PassSize
from latentflow_nodes.engine.worker import Worker

ANY_SIZE = PassSize(rows=1)


class Held:
    """A worker of whose calls one runs, until entered no more, and the others wait."""

    def __init__(self) -> None:
        self.metrics = Instruments(NODE, model="controlnet-1", role="ControlNet")
        self.worker = Worker(threads=1, max_waiting=2, lock=ComputeLock(None), load=Load(self.metrics))
        self._calls: list[asyncio.Task[bool]] = []
        self._started, self._end = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def running(self, *, resumed: bool) -> AsyncIterator[None]:
        self.add(resumed=resumed)
        await asyncio.to_thread(self._started.wait)
        yield
        self._end.set()
        assert await asyncio.gather(*self._calls) == [True] * len(self._calls)
        self.worker.close()

    def add(self, *, resumed: bool) -> None:
        self._calls.append(asyncio.create_task(self.worker.run(self._work, size=ANY_SIZE, resumed=resumed)))

    def _work(self) -> bool:
        self._started.set()
        return self._end.wait(30)

    async def queued(self) -> float | None:
        """The queue depth that the server reports, once every added call has reached it."""
        await asyncio.sleep(0)
        return self.metrics.registry.get_sample_value(
            "latentflow_queue_depth", {"model": "controlnet-1", "role": "ControlNet"}
        )


async def test_a_request_before_its_first_forward_pass_counts_as_queued() -> None:
    held = Held()
    async with held.running(resumed=False):
        held.add(resumed=False)
        held.add(resumed=False)
        assert await held.queued() == 2
    assert await held.queued() == 0


async def test_a_later_pass_of_a_request_does_not_count_as_queued() -> None:
    held = Held()
    async with held.running(resumed=True):
        held.add(resumed=True)
        assert await held.queued() == 0
        held.add(resumed=False)
        assert await held.queued() == 1


async def test_calls_beyond_the_queue_limit_are_refused() -> None:
    held = Held()
    async with held.running(resumed=False):
        held.add(resumed=True)
        held.add(resumed=True)
        assert await held.queued() == 0
        with pytest.raises(OverloadedError, match="queue is full"):
            await held.worker.run(lambda: True, size=ANY_SIZE)

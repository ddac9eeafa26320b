"""The thread in which a role's forward passes run, and what of its queue counts as waiting requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest
from latentflow.errors import OverloadedError
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes.engine.compute_lock import Turn
from latentflow_nodes.engine.worker import Worker


class Held:
    """A worker of whose calls one runs, until entered no more, and the others wait."""

    def __init__(self) -> None:
        self.metrics = Instruments(NODE, model="controlnet-1", role="ControlNet")
        self.worker = Worker(threads=1, max_waiting=2, turn=Turn(None), metrics=self.metrics)
        self._calls: list[asyncio.Task[bool]] = []
        self._begun, self._end = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def running(self, *, begun: bool) -> AsyncIterator[None]:
        self.add(begun=begun)
        await asyncio.to_thread(self._begun.wait)
        yield
        self._end.set()
        assert await asyncio.gather(*self._calls) == [True] * len(self._calls)
        self.worker.close()

    def add(self, *, begun: bool) -> None:
        self._calls.append(asyncio.create_task(self.worker.run(self._work, begun=begun)))

    def _work(self) -> bool:
        self._begun.set()
        return self._end.wait(30)

    async def waiting(self) -> float | None:
        """What the server says that waits, once every call that was added is there."""
        await asyncio.sleep(0)
        return self.metrics.registry.get_sample_value(
            "latentflow_queue_depth", {"model": "controlnet-1", "role": "ControlNet"}
        )


async def test_a_request_that_waits_for_its_first_forward_pass_is_one_that_waits() -> None:
    held = Held()
    async with held.running(begun=False):
        held.add(begun=False)
        held.add(begun=False)
        assert await held.waiting() == 2
    assert await held.waiting() == 0


async def test_the_next_pass_of_a_request_that_has_had_one_is_not() -> None:
    held = Held()
    async with held.running(begun=True):
        held.add(begun=True)
        assert await held.waiting() == 0
        held.add(begun=False)
        assert await held.waiting() == 1


async def test_more_than_may_wait_are_refused() -> None:
    held = Held()
    async with held.running(begun=False):
        held.add(begun=True)
        held.add(begun=True)
        assert await held.waiting() == 0
        with pytest.raises(OverloadedError, match="queue is full"):
            await held.worker.run(lambda: True)

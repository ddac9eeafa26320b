"""The thread in which a role's forward passes run, and what of its queue counts as waiting requests."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import torch
from latentflow.errors import InvalidRequestError, LatentflowError, OverloadedError
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.load import Load, PassSize
from latentflow_nodes.engine.worker import Worker
from support.locks import until_locked

ANY_SIZE = PassSize(rows=1)


class Held:
    """A worker of whose calls one runs, until entered no more, and the others wait."""

    def __init__(self) -> None:
        self.metrics = Instruments(NODE, model="controlnet-1", role="ControlNet")
        self.passes: list[list[str]] = []
        self.worker: Worker[str, str] = Worker(
            self._work, threads=1, max_running=2, max_waiting=4, lock=ComputeLock(None), load=Load(self.metrics)
        )
        self._calls: list[asyncio.Task[str]] = []
        self._started, self._end = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def running(self, *, resumed: bool = False) -> AsyncIterator[None]:
        self.add("first", resumed=resumed)
        await asyncio.to_thread(self._started.wait)
        yield
        self._end.set()
        await asyncio.wait(self._calls)
        self.worker.close()

    def add(self, item: str, *, group: str = "g", resumed: bool = False) -> asyncio.Task[str]:
        call = asyncio.create_task(self.worker.run(item, group=group, size=ANY_SIZE, resumed=resumed))
        self._calls.append(call)
        return call

    def _work(self, items: Sequence[str]) -> list[str | LatentflowError]:
        self.passes.append(list(items))
        self._started.set()
        assert self._end.wait(30)
        if "defective" in items:
            raise RuntimeError("defective")
        if len(items) > self.room:
            raise torch.OutOfMemoryError
        return [InvalidRequestError("refused") if item == "refused" else item.upper() for item in items]

    room = 64

    async def queued(self) -> float | None:
        """The queue depth that the server reports, once every added call has reached it."""
        await asyncio.sleep(0)
        return self.metrics.registry.get_sample_value(
            "latentflow_queue_depth", {"model": "controlnet-1", "role": "ControlNet"}
        )


async def test_a_request_before_its_first_forward_pass_counts_as_queued() -> None:
    held = Held()
    async with held.running():
        held.add("a")
        held.add("b")
        assert await held.queued() == 2
    assert await held.queued() == 0


async def test_a_later_pass_of_a_request_does_not_count_as_queued() -> None:
    held = Held()
    async with held.running(resumed=True):
        held.add("a", resumed=True)
        assert await held.queued() == 0
        held.add("b")
        assert await held.queued() == 1


async def test_calls_beyond_the_queue_limit_are_refused() -> None:
    held = Held()
    async with held.running():
        for item in "abcd":
            held.add(item, resumed=True)
        assert await held.queued() == 0
        with pytest.raises(OverloadedError, match="queue is full"):
            await held.worker.run("e", group="g", size=ANY_SIZE)


async def test_queued_calls_of_a_group_share_a_pass_up_to_the_limit() -> None:
    held = Held()
    async with held.running():
        calls = [held.add("a"), held.add("x", group="other"), held.add("b"), held.add("c")]
        await asyncio.sleep(0)
    assert held.passes == [["first"], ["a", "b"], ["x"], ["c"]]
    assert [call.result() for call in calls] == ["A", "X", "B", "C"]


async def test_only_the_defective_call_of_a_pass_fails() -> None:
    held = Held()
    async with held.running():
        defective, whole = held.add("defective"), held.add("a")
        await asyncio.sleep(0)
    assert isinstance(defective.exception(), RuntimeError)
    assert whole.result() == "A"


async def test_a_refused_item_does_not_fail_the_others_of_its_pass() -> None:
    held = Held()
    async with held.running():
        refused, whole = held.add("refused"), held.add("a")
        await asyncio.sleep(0)
    assert isinstance(refused.exception(), InvalidRequestError)
    assert whole.result() == "A"


async def test_a_pass_that_runs_out_of_memory_is_repeated_with_fewer_calls() -> None:
    held = Held()
    held.room = 1
    async with held.running():
        calls = [held.add(item) for item in "abcd"]
        await asyncio.sleep(0)
    assert [call.result() for call in calls] == ["A", "B", "C", "D"]
    assert held.passes == [["first"], ["a", "b"], ["a"], ["b"], ["c"], ["d"]]


async def test_the_item_of_a_caller_that_left_is_not_run() -> None:
    held = Held()
    async with held.running():
        left, stayed = held.add("left"), held.add("a")
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        assert await held.queued() == 1
    assert stayed.result() == "A"
    assert held.passes == [["first"], ["a"]]


async def test_closing_cancels_queued_calls() -> None:
    held = Held()
    async with held.running():
        queued = held.add("a")
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(held.worker.close))
        await asyncio.wait([queued])
        assert queued.cancelled()
    await closing


async def test_a_worker_that_was_closed_runs_calls_again_after_a_start() -> None:
    held = Held()
    async with held.running():
        pass
    held.worker.start()
    assert await held.worker.run("a", group="g", size=ANY_SIZE) == "A"
    held.worker.close()


async def test_a_worker_that_is_closed_while_it_waits_for_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    other = ComputeLock(tmp_path / "lock")
    other.take()
    worker: Worker[str, str] = Worker(
        lambda items: list(items),
        threads=1,
        max_running=1,
        max_waiting=1,
        lock=ComputeLock(tmp_path / "lock"),
        load=Load(Instruments(NODE, model="controlnet-1", role="ControlNet")),
    )
    call = asyncio.create_task(worker.run("a", group="g", size=ANY_SIZE))
    with (tmp_path / "lock.next").open() as next_place:
        await asyncio.to_thread(until_locked, next_place)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    await asyncio.wait([call])
    other.close()
    await closing
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""Second deliveries join the first."""

from __future__ import annotations

import asyncio

import pytest
from latentflow.errors import ConflictError, UnavailableError
from latentflow.v1 import generation_pb2
from latentflow_gateway.joins import Broadcast, Joins


def event(step: int) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(progress=generation_pb2.Progress(step=step))


def request(prompt: str = "a", key: str = "k") -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=prompt, idempotency_key=key)


class Work:
    """Work that goes on when it is told to, and counts how often it was begun and cancelled."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go_on = asyncio.Event()
        self.begun = 0
        self.cancelled = asyncio.Event()
        self._error = error

    async def __call__(self, broadcast: Broadcast) -> None:
        self.begun += 1
        broadcast.emit(event(1))
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self._error is not None:
            raise self._error
        broadcast.emit(event(2))


async def steps(broadcast: Broadcast) -> list[int]:
    return [one.progress.step async for one in broadcast.listen()]


async def test_a_second_delivery_gets_the_events_of_the_first_from_the_start() -> None:
    joins, work = Joins(), Work()
    first = asyncio.create_task(steps(joins.join(request(), work)))
    second = asyncio.create_task(steps(joins.join(request(), work)))
    work.go_on.set()
    assert await first == await second == [1, 2]
    assert await steps(joins.join(request(), work)) == [1, 2]
    assert work.begun == 1


async def test_requests_without_a_key_are_their_own() -> None:
    joins, work = Joins(), Work()
    work.go_on.set()
    await asyncio.gather(*(steps(joins.join(request(key=""), work)) for _ in range(3)))
    assert work.begun == 3


async def test_a_key_of_another_request_is_refused() -> None:
    joins, work = Joins(), Work()
    work.go_on.set()
    await steps(joins.join(request(), work))
    with pytest.raises(ConflictError, match="use a new key"):
        joins.join(request(prompt="b"), work)


async def test_a_key_of_another_client_is_another_key() -> None:
    joins, work = Joins(), Work()
    work.go_on.set()
    for client, prompt in (("anna", "a"), ("ben", "a"), ("anna", "a"), ("cleo", "b")):
        await steps(joins.join(request(prompt=prompt), work, client=client))
    assert work.begun == 3


async def test_a_request_that_failed_is_run_again() -> None:
    joins, work = Joins(), Work(UnavailableError("gone"))
    work.go_on.set()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await steps(joins.join(request(), work))
    assert work.begun == 2


async def test_the_work_is_cancelled_when_its_last_listener_leaves_and_not_before() -> None:
    joins, work = Joins(), Work()
    broadcast = joins.join(request(), work)
    first, second = broadcast.listen(), broadcast.listen()
    await anext(first)
    await anext(second)
    await first.aclose()
    assert not work.cancelled.is_set()
    await second.aclose()
    await asyncio.wait_for(work.cancelled.wait(), 5)

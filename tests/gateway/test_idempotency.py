"""A request that is sent again gets the events of the first."""

from __future__ import annotations

import asyncio

import pytest
from latentflow.errors import ConflictError, UnavailableError
from latentflow.v1 import generation_pb2
from latentflow_gateway.idempotency import Broadcast, IdempotentRequests


def event(step: int) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(progress=generation_pb2.Progress(step=step))


def request(prompt: str = "a", key: str = "k") -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=prompt, idempotency_key=key)


class Work:
    """Work that blocks until `resume` is set, and counts how often it was started and cancelled."""

    def __init__(self, error: Exception | None = None) -> None:
        self.resume = asyncio.Event()
        self.started = 0
        self.cancelled = asyncio.Event()
        self._error = error

    async def __call__(self, broadcast: Broadcast) -> None:
        self.started += 1
        broadcast.emit(event(1))
        try:
            await self.resume.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self._error is not None:
            raise self._error
        broadcast.emit(event(2))


async def steps(broadcast: Broadcast) -> list[int]:
    return [one.progress.step async for one in broadcast.listen()]


async def test_a_request_sent_again_gets_the_events_of_the_first_from_the_start() -> None:
    requests, work = IdempotentRequests(), Work()
    first = asyncio.create_task(steps(requests.submit(request(), work)))
    second = asyncio.create_task(steps(requests.submit(request(), work)))
    work.resume.set()
    assert await first == await second == [1, 2]
    assert await steps(requests.submit(request(), work)) == [1, 2]
    assert work.started == 1


async def test_requests_without_a_key_each_run() -> None:
    requests, work = IdempotentRequests(), Work()
    work.resume.set()
    await asyncio.gather(*(steps(requests.submit(request(key=""), work)) for _ in range(3)))
    assert work.started == 3


async def test_a_key_that_belongs_to_another_request_is_refused() -> None:
    requests, work = IdempotentRequests(), Work()
    work.resume.set()
    await steps(requests.submit(request(), work))
    with pytest.raises(ConflictError, match="use a new key"):
        requests.submit(request(prompt="b"), work)


async def test_the_same_key_of_two_clients_is_two_keys() -> None:
    requests, work = IdempotentRequests(), Work()
    work.resume.set()
    for client, prompt in (("anna", "a"), ("ben", "a"), ("anna", "a"), ("cleo", "b")):
        await steps(requests.submit(request(prompt=prompt), work, client=client))
    assert work.started == 3


async def test_a_failed_request_runs_again() -> None:
    requests, work = IdempotentRequests(), Work(UnavailableError("gone"))
    work.resume.set()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await steps(requests.submit(request(), work))
    assert work.started == 2


async def test_the_work_is_cancelled_when_its_last_listener_leaves_and_not_before() -> None:
    requests, work = IdempotentRequests(), Work()
    broadcast = requests.submit(request(), work)
    first, second = broadcast.listen(), broadcast.listen()
    await anext(first)
    await anext(second)
    await first.aclose()
    assert not work.cancelled.is_set()
    await second.aclose()
    await asyncio.wait_for(work.cancelled.wait(), 5)

"""What surrounds a call is the same for every server: its status, what is recorded of it, refusal, interruption."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest
from latentflow import AsyncClient, Event, Retries
from latentflow.errors import InternalError, LatentflowError, NotFoundError, UnavailableError
from latentflow.internal.calls import Accounting, Call, Context, Outcome, Running, served
from latentflow.reasons import Reason
from latentflow.v1 import generation_pb2, generation_pb2_grpc

STEP = generation_pb2.GenerateResponse(progress=generation_pb2.Progress(step=1, total=2))
Handler = Callable[[], AsyncIterator[generation_pb2.GenerateResponse]]


class Servicer(generation_pb2_grpc.GenerationServicer):
    """Serves Generate by a handler and keeps the outcomes of its calls."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.running = Running()
        self.outcomes: asyncio.Queue[Outcome] = asyncio.Queue()

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        accounting = Accounting(running=self.running, ended=self.outcomes.put_nowait)
        async for response in served(Call.of("Generate", context), self._handler(), context, accounting):
            yield response


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[tuple[Servicer, AsyncClient]]:
    server, servicer = grpc.aio.server(), Servicer(handler)
    generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}", retries=Retries(attempts=1), timeout=20) as client:
        yield servicer, client
    await server.stop(0)


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (NotFoundError("No such thing."), NotFoundError, "No such thing."),
        (ZeroDivisionError("by zero"), InternalError, "Generate failed unexpectedly: ZeroDivisionError: by zero"),
    ],
)
async def test_the_error_of_a_call_is_its_status_and_its_outcome(
    raised: Exception, kind: type[LatentflowError], words: str
) -> None:
    async def handler() -> AsyncIterator[generation_pb2.GenerateResponse]:
        yield STEP
        raise raised

    async with serving(handler) as (servicer, client):
        with pytest.raises(kind, match=words):
            await client.generate("a")
        outcome = await servicer.outcomes.get()
    assert (outcome.code, outcome.reason) == (kind.code, kind.default_reason)


async def test_a_cancelled_call_ends_its_handler_and_is_recorded_as_cancelled() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handler() -> AsyncIterator[generation_pb2.GenerateResponse]:
        yield STEP
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(handler) as (servicer, client):
        call = asyncio.create_task(client.generate("a"))
        await asyncio.wait_for(started.wait(), 10)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 10)
        outcome = await asyncio.wait_for(servicer.outcomes.get(), 10)
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.CANCELLED, Reason.CANCELLED)


async def test_a_draining_server_refuses_new_calls_and_waits_for_the_admitted_ones() -> None:
    finish = asyncio.Event()

    async def handler() -> AsyncIterator[generation_pb2.GenerateResponse]:
        yield STEP
        await finish.wait()

    async with serving(handler) as (servicer, client):
        admitted = client.stream("a")
        await anext(admitted)
        draining = asyncio.create_task(servicer.running.drained())
        with pytest.raises(UnavailableError) as caught:
            await client.generate("b")
        assert caught.value.reason == Reason.DRAINING
        assert not draining.done()
        finish.set()
        with contextlib.suppress(LatentflowError):
            _: list[Event] = [event async for event in admitted]
        await asyncio.wait_for(draining, 10)
        # The refused call is not recorded: it took no time and would distort what is measured of the others.
        assert servicer.outcomes.qsize() == 1


async def test_a_paused_server_refuses_new_calls_and_can_end_those_that_wait() -> None:
    async def handler() -> AsyncIterator[generation_pb2.GenerateResponse]:
        yield STEP
        await asyncio.Event().wait()

    async with serving(handler) as (servicer, client):
        running = client.stream("a")
        await anext(running)
        servicer.running.pause(lambda: UnavailableError("It sleeps.", reason=Reason.ASLEEP))
        with pytest.raises(UnavailableError, match="It sleeps") as caught:
            await client.generate("b")
        assert caught.value.reason == Reason.ASLEEP
        servicer.running.interrupt()
        with pytest.raises(UnavailableError, match="It sleeps"):
            _: list[Event] = [event async for event in running]
        await asyncio.wait_for(servicer.running.ended(), 10)
        servicer.running.resume()
        with servicer.running.admitted():
            pass
    assert (await servicer.outcomes.get()).reason == Reason.ASLEEP

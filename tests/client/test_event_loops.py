"""An asyncio client in several event loops: what it keeps of each, and what `close` ends, with a real gRPC server."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio
import pytest
from latentflow import NO_RETRIES, AsyncClient
from latentflow.errors import InvalidRequestError
from latentflow.v1 import generation_pb2, generation_pb2_grpc

Method = Callable[[AsyncClient], Awaitable[Any]]
METHODS: dict[str, Method] = {
    "generate": lambda client: client.generate("a", timeout=60),
    "describe": lambda client: client.describe("a", timeout=60),
}


class Gateway(generation_pb2_grpc.GenerationServicer):
    """Lists no workflows, and never responds to other calls."""

    def __init__(self) -> None:
        self.target = ""
        self.called = threading.Event()
        self.ended = threading.Event()

    def ListWorkflows(  # noqa: N802
        self, request: Any, context: grpc.ServicerContext
    ) -> generation_pb2.ListWorkflowsResponse:
        return generation_pb2.ListWorkflowsResponse()

    def DescribeWorkflow(  # noqa: N802
        self, request: Any, context: grpc.ServicerContext
    ) -> generation_pb2.DescribeWorkflowResponse:
        self._hold(context)
        return generation_pb2.DescribeWorkflowResponse()

    def Generate(  # noqa: N802
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        self._hold(context)
        yield from ()

    def _hold(self, context: grpc.ServicerContext) -> None:
        assert context.add_callback(self.ended.set)
        self.called.set()
        self.ended.wait(60)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    servicer = Gateway()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(0).wait()


def client_of(gateway: Gateway) -> AsyncClient:
    return AsyncClient(gateway.target, retries=NO_RETRIES)


def channels() -> int:
    gc.collect()
    # `isinstance` would run code of other libraries' objects.
    return sum(issubclass(type(one), grpc.aio.Channel) for one in gc.get_objects())


def test_a_client_keeps_no_channel_of_an_event_loop_that_has_ended(gateway: Gateway) -> None:
    before, client = channels(), client_of(gateway)
    for _ in range(4):
        asyncio.run(client.workflows())
    assert channels() - before == 1
    asyncio.run(client.close())
    assert channels() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("connected", [False, True])
async def test_close_ends_a_call_of_its_own_event_loop(method: str, connected: bool, gateway: Gateway) -> None:
    client = client_of(gateway)
    if connected:
        await client.workflows()
    call = asyncio.ensure_future(METHODS[method](client))
    assert await asyncio.to_thread(gateway.called.wait, 30)
    await client.close()
    with pytest.raises(InvalidRequestError, match="This client is closed"):
        await asyncio.wait_for(call, 30)
    assert await asyncio.to_thread(gateway.ended.wait, 30)


@pytest.mark.parametrize("method", METHODS)
async def test_close_ends_a_call_of_another_event_loop(method: str, gateway: Gateway) -> None:
    client = client_of(gateway)

    async def called() -> None:
        await METHODS[method](client)

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, called()))
    assert await asyncio.to_thread(gateway.called.wait, 30)
    await client.close()
    with pytest.raises(InvalidRequestError, match="This client is closed"):
        await asyncio.wait_for(other, 30)
    assert await asyncio.to_thread(gateway.ended.wait, 30)


def test_close_ends_a_call_whose_event_loop_runs_again_later(gateway: Gateway) -> None:
    client, loop = client_of(gateway), asyncio.new_event_loop()
    call = loop.create_task(client.generate("a", timeout=60))
    loop.run_until_complete(asyncio.to_thread(gateway.called.wait, 30))
    asyncio.run(client.close())
    with pytest.raises(InvalidRequestError, match="This client is closed"):
        loop.run_until_complete(asyncio.wait_for(call, 30))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.mark.parametrize("method", METHODS)
async def test_a_cancelled_task_stays_cancelled_although_the_client_is_closed(method: str, gateway: Gateway) -> None:
    client = client_of(gateway)
    call = asyncio.ensure_future(METHODS[method](client))
    assert await asyncio.to_thread(gateway.called.wait, 30)
    call.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await call

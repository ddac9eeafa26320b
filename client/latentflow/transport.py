"""Transports carry a client's calls: over gRPC, or to a mock in tests.

A transport sends and receives messages and raises `latentflow.errors`; the clients decide on retries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import grpc
import grpc.aio

from latentflow.errors import LatentflowError, UnavailableError
from latentflow.internal import rpc, status
from latentflow.reasons import Reason
from latentflow.v1 import generation_pb2, generation_pb2_grpc

Metadata = list[tuple[str, str]]
# How long a new request waits for a lost connection to a gateway that has responded before.
_RECONNECT_SECONDS = 5.0


class Transport(Protocol):
    """Synchronous calls. `timeout` in seconds, None for none."""

    def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> Iterator[generation_pb2.GenerateResponse]: ...

    def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse: ...

    def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """As `Transport`, for asyncio."""

    def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> AsyncIterator[generation_pb2.GenerateResponse]: ...

    async def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse: ...

    async def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse: ...

    async def close(self) -> None: ...


class GrpcTransport:
    """A gRPC channel to a gateway. Closing a `generate` iterator early cancels the call.

    A new request waits up to five seconds for a lost connection; it fails at once where the gateway never responded.
    """

    def __init__(self, target: str, *, tls: rpc.Tls | None) -> None:
        self._target = target
        options = list(rpc.CHANNEL_OPTIONS)
        self._channel = (
            grpc.secure_channel(target, tls.channel_credentials(), [*options, *tls.channel_options()])
            if tls
            else grpc.insecure_channel(target, options)
        )
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._responded = False

    def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> Iterator[generation_pb2.GenerateResponse]:
        if self._responded:
            with contextlib.suppress(grpc.FutureTimeoutError):
                grpc.channel_ready_future(self._channel).result(_reconnect_seconds(timeout))
        call = self._stub.Generate(request, timeout=timeout, metadata=metadata)
        try:
            for response in call:
                self._responded = True
                yield response
        except grpc.RpcError as error:
            raise _explained(error, self._target) from None
        finally:
            call.cancel()

    def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse:
        try:
            response: generation_pb2.DescribeWorkflowResponse = self._stub.DescribeWorkflow(
                request, timeout=timeout, metadata=metadata
            )
        except grpc.RpcError as error:
            raise _explained(error, self._target) from None
        return response

    def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse:
        try:
            response: generation_pb2.ListWorkflowsResponse = self._stub.ListWorkflows(
                generation_pb2.ListWorkflowsRequest(), timeout=timeout, metadata=metadata
            )
        except grpc.RpcError as error:
            raise _explained(error, self._target) from None
        return response

    def close(self) -> None:
        self._channel.close()


class AsyncGrpcTransport:
    """As `GrpcTransport`, for asyncio."""

    def __init__(self, target: str, *, tls: rpc.Tls | None) -> None:
        self._target = target
        self._channel = rpc.channel(target, tls=tls)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._responded = False

    async def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        if self._responded:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._channel.channel_ready(), _reconnect_seconds(timeout))
        call = self._stub.Generate(request, timeout=timeout, metadata=metadata)
        try:
            async for response in call:
                self._responded = True
                yield response
        except grpc.RpcError as error:
            raise _explained(error, self._target) from None
        finally:
            call.cancel()

    async def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse:
        try:
            response: generation_pb2.DescribeWorkflowResponse = await self._stub.DescribeWorkflow(
                request, timeout=timeout, metadata=metadata
            )
        except grpc.RpcError as error:
            raise _explained(error, self._target) from None
        return response

    async def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse:
        try:
            response: generation_pb2.ListWorkflowsResponse = await self._stub.ListWorkflows(
                generation_pb2.ListWorkflowsRequest(), timeout=timeout, metadata=metadata
            )
        except grpc.RpcError as error:
            raise _explained(error, self._target) from None
        return response

    async def close(self) -> None:
        await self._channel.close()


def _reconnect_seconds(timeout: float | None) -> float:
    return _RECONNECT_SECONDS if timeout is None else min(timeout, _RECONNECT_SECONDS)


def _explained(rpc_error: grpc.RpcError, target: str) -> LatentflowError:
    """The error of a call; where no gateway responded, it names the target and what to do."""
    error = status.error_from(rpc_error)
    if isinstance(error, UnavailableError) and error.reason == UnavailableError.default_reason:
        return UnavailableError(
            f"No gateway responds at {target}. Start one with `latentflow up FILE`, or pass another target. "
            f"({error.message})",
            reason=Reason.GATEWAY_UNREACHABLE,
        )
    return error

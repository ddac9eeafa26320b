"""How a client's calls travel: the seam between the clients and gRPC, where a mock can stand instead.

A transport moves messages and raises `latentflow.errors`; it decides nothing.
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
# A gateway that has answered before is given so long to come back, or another in its place, before a new request fails.
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
    """The same, asynchronous."""

    def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> AsyncIterator[generation_pb2.GenerateResponse]: ...

    async def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse: ...

    async def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse: ...

    async def close(self) -> None: ...


class GrpcTransport:
    """A gRPC channel to a gateway. Leaving a `generate` iterator early cancels the call.

    A new request waits a little for a lost connection to come back; where there never was one it fails at once.
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
        self._met = False

    def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> Iterator[generation_pb2.GenerateResponse]:
        if self._met:
            with contextlib.suppress(grpc.FutureTimeoutError):
                grpc.channel_ready_future(self._channel).result(_patience(timeout))
        call = self._stub.Generate(request, timeout=timeout, metadata=metadata)
        try:
            for response in call:
                self._met = True
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
    """A gRPC channel to a gateway, for asyncio; as `GrpcTransport`."""

    def __init__(self, target: str, *, tls: rpc.Tls | None) -> None:
        self._target = target
        self._channel = rpc.channel(target, tls=tls)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._met = False

    async def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        if self._met:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._channel.channel_ready(), _patience(timeout))
        call = self._stub.Generate(request, timeout=timeout, metadata=metadata)
        try:
            async for response in call:
                self._met = True
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


def _patience(timeout: float | None) -> float:
    return _RECONNECT_SECONDS if timeout is None else min(timeout, _RECONNECT_SECONDS)


def _explained(rpc_error: grpc.RpcError, target: str) -> LatentflowError:
    """The call's error; where nobody answered at all, with where and what to do."""
    error = status.error_from(rpc_error)
    if isinstance(error, UnavailableError) and error.reason == UnavailableError.default_reason:
        return UnavailableError(
            f"No gateway answers at {target}. Start one with `latentflow up FILE`, or name another target. "
            f"({error.message})",
            reason=Reason.GATEWAY_UNREACHABLE,
        )
    return error

"""Transports carry a client's calls: over gRPC, or to a mock in tests.

A transport sends and receives messages and raises `latentflow.errors`; the clients decide on retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import grpc
import grpc.aio

from latentflow.errors import InvalidRequestError, LatentflowError, UnavailableError
from latentflow.internal import rpc, status, targets
from latentflow.reasons import Reason
from latentflow.v1 import generation_pb2, generation_pb2_grpc

Metadata = list[tuple[str, str]]
# How long a new request waits for a lost connection to a gateway that has responded before.
_RECONNECT_SECONDS = 10.0
# The synchronous channel does not tell a lost connection from a slow one, and keepalive needs half a minute for that.
_SILENT_SECONDS = 30.0


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

    A new request waits up to half a minute for a lost connection; it fails at once where no gateway ever responded on
    this machine.
    """

    def __init__(self, target: str, *, tls: rpc.Tls | None) -> None:
        self._target = targets.check(target)
        self._has_tls = tls is not None
        options = rpc.channel_options(tls=tls, proxied=targets.proxy_variable(target) is not None)
        self._channel = (
            grpc.secure_channel(target, tls.channel_credentials(), options)
            if tls
            else grpc.insecure_channel(target, options)
        )
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._responded = False
        self._closed = False

    def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> Iterator[generation_pb2.GenerateResponse]:
        call = self._start(
            self._stub.Generate, request, timeout=timeout, metadata=metadata, wait_for_ready=self._responded
        )
        # A gateway sends the headers when it gets the request. grpc offers no wait with a limit for them.
        late = threading.Timer(_SILENT_SECONDS, call.cancel)
        late.daemon = True
        if self._responded:
            late.start()
        try:
            call.initial_metadata()
            is_late = late.finished.is_set()
            late.cancel()
            if self._responded and is_late:
                raise self._silent(f"no response within {_SILENT_SECONDS:g} s")
            for response in call:
                self._responded = True
                yield response
        except grpc.RpcError as error:
            raise self._explained(error) from None
        finally:
            late.cancel()
            call.cancel()

    def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse:
        try:
            response: generation_pb2.DescribeWorkflowResponse = self._start(
                self._stub.DescribeWorkflow, request, timeout=timeout, metadata=metadata
            )
        except grpc.RpcError as error:
            raise self._explained(error) from None
        self._responded = True
        return response

    def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse:
        try:
            response: generation_pb2.ListWorkflowsResponse = self._start(
                self._stub.ListWorkflows,
                generation_pb2.ListWorkflowsRequest(),
                timeout=timeout,
                metadata=metadata,
            )
        except grpc.RpcError as error:
            raise self._explained(error) from None
        self._responded = True
        return response

    def close(self) -> None:
        self._closed = True
        self._channel.close()

    def _start(self, method: Any, request: Any, **options: Any) -> Any:
        try:
            return method(request, **options)
        except ValueError:
            if self._closed:
                raise _closed() from None
            raise

    def _silent(self, problem: str) -> UnavailableError:
        return _unreachable(self._target, problem, has_tls=self._has_tls, responded=True)

    def _explained(self, error: grpc.RpcError) -> LatentflowError:
        if self._closed:
            return _closed()
        return _explained(error, self._target, has_tls=self._has_tls, responded=self._responded)


class AsyncGrpcTransport:
    """As `GrpcTransport`, for asyncio; it waits ten seconds.

    May be made outside an event loop, and used by several, one after another or at the same time in several threads.
    """

    def __init__(self, target: str, *, tls: rpc.Tls | None) -> None:
        self._target = targets.check(target)
        self._tls = tls
        # grpc binds a channel to the event loop in which it was made, and the channel keeps a reference to the loop.
        self._channels: dict[asyncio.AbstractEventLoop, grpc.aio.Channel] = {}
        self._responded = False
        self._closed = False
        self._lock = threading.Lock()

    async def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None, metadata: Metadata
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        channel = self._channel()
        stub = generation_pb2_grpc.GenerationStub(channel)
        call = stub.Generate(request, timeout=timeout, metadata=metadata, wait_for_ready=self._responded)
        try:
            with self._errors():
                if self._responded and not await _is_connected(call, channel):
                    raise _unreachable(
                        self._target,
                        f"no connection within {_RECONNECT_SECONDS:g} s",
                        has_tls=self._tls is not None,
                        responded=True,
                    )
                async for response in call:
                    self._responded = True
                    yield response
        finally:
            call.cancel()

    async def describe(
        self, request: generation_pb2.DescribeWorkflowRequest, *, timeout: float | None, metadata: Metadata
    ) -> generation_pb2.DescribeWorkflowResponse:
        stub = generation_pb2_grpc.GenerationStub(self._channel())
        with self._errors():
            response: generation_pb2.DescribeWorkflowResponse = await stub.DescribeWorkflow(
                request, timeout=timeout, metadata=metadata
            )
        self._responded = True
        return response

    async def workflows(self, *, timeout: float | None, metadata: Metadata) -> generation_pb2.ListWorkflowsResponse:
        stub = generation_pb2_grpc.GenerationStub(self._channel())
        with self._errors():
            response: generation_pb2.ListWorkflowsResponse = await stub.ListWorkflows(
                generation_pb2.ListWorkflowsRequest(), timeout=timeout, metadata=metadata
            )
        self._responded = True
        return response

    async def close(self) -> None:
        """Ends the calls of all event loops, without a wait for other loops than the one that runs it."""
        with self._lock:
            self._closed = True
            channels, self._channels = self._channels, {}
        for loop, channel in channels.items():
            if loop is asyncio.get_running_loop():
                await channel.close()
            else:
                # A loop that has ended raises RuntimeError; its calls ended with it.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(lambda other: asyncio.ensure_future(other.close()), channel)

    def _channel(self) -> grpc.aio.Channel:
        """The channel of the running event loop. InvalidRequestError after `close`."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._closed:
                raise _closed()
            if loop not in self._channels:
                self._channels = {one: channel for one, channel in self._channels.items() if not one.is_closed()}
                proxied = targets.proxy_variable(self._target) is not None
                self._channels[loop] = rpc.channel(self._target, tls=self._tls, proxied=proxied)
            return self._channels[loop]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            if self._closed:
                raise _closed() from None
            has_tls = self._tls is not None
            raise _explained(error, self._target, has_tls=has_tls, responded=self._responded) from None
        except asyncio.CancelledError:
            # grpc raises it where `close` cancelled the call, although nothing cancelled the task.
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise _closed() from None
            raise


async def _is_connected(call: Any, channel: grpc.aio.Channel) -> bool:
    """Whether a call has a connection: at once where the gateway has it, after some seconds otherwise."""
    # A gateway sends the headers when it gets the request. To cancel this wait would cancel the call.
    headers = asyncio.ensure_future(call.initial_metadata())
    await asyncio.wait({headers}, timeout=_RECONNECT_SECONDS)
    return headers.done() or channel.get_state() is grpc.ChannelConnectivity.READY


def _closed() -> InvalidRequestError:
    return InvalidRequestError("This client is closed; create another one.")


def _explained(rpc_error: grpc.RpcError, target: str, *, has_tls: bool, responded: bool) -> LatentflowError:
    """The error of a call; where no gateway responded, it names the target and what to do."""
    error = status.error_from(rpc_error)
    if isinstance(error, UnavailableError) and error.reason == UnavailableError.default_reason:
        return _unreachable(target, error.message, has_tls=has_tls, responded=responded)
    return error


def _unreachable(target: str, problem: str, *, has_tls: bool, responded: bool) -> UnavailableError:
    """The error where no gateway responds.

    On this machine a refusal is final if none ever responded. Elsewhere one of several gateways may just be restarting.
    """
    variable = targets.proxy_variable(target)
    remedy = f"add the gateway to {targets.exemption_variable()}"
    proxy = f" gRPC uses the HTTP proxy of {variable}; {remedy}." if variable else ""
    error = UnavailableError(
        f"No gateway responds at {target}. {_advice(problem, has_tls=has_tls)}{proxy} ({problem})",
        reason=Reason.GATEWAY_UNREACHABLE,
    )
    error.retryable = responded or not targets.is_local(target)
    return error


def _advice(problem: str, *, has_tls: bool) -> str:
    """What to do about a connection that failed, by the words of gRPC and of its TLS library."""
    if any(words in problem for words in ("SETTINGS frame", "HTTP/1.", "ALPN")):
        return "That port speaks HTTP/1.1; pass the address of gRPC, whose port is 8400 by default."
    if "WRONG_VERSION_NUMBER" in problem:
        return "That port serves without TLS; leave out Client(tls=…) and --tls-ca, or pass the address of a gateway with TLS."
    if any(words in problem for words in ("CERTIFICATE_VERIFY_FAILED", "Hostname", "peer certificate")):
        return (
            "The certificate of the gateway is not valid for this client. Pass the CA that has signed it, as "
            "Client(tls=Tls(ca=…)) or --tls-ca, and a target whose host the certificate contains."
        )
    # Not that of a call that a server has ended.
    if "failed to connect" in problem and "Socket closed" in problem:
        if has_tls:
            return (
                "The server closed the connection at once, as a gateway that requires client certificates does: pass yours, as "
                "Client(tls=Tls(certificate=…, key=…))."
            )
        return (
            "The server closed the connection at once, as a gateway with TLS does: pass its CA, as Client(tls=Tls(ca=…)) or "
            "--tls-ca."
        )
    return "Start one with `latentflow up FILE`, or pass another target."

"""A denoiser's exchange with one peer, on one gRPC stream for the whole request: one answer for each step.

The peer is a ControlNet that sends residuals, or another replica that predicts a guidance half. The engine's thread requests
a step and gets a future; the event loop sends, receives and resolves it. A request is sent after the one before it was
answered, because the peer may write the answer to the same page of shared memory. The stream has the deadline of the request,
so that a peer whose caller is lost keeps nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
import structlog
import torch
from latentflow.errors import LatentflowError, UnavailableError
from latentflow.internal import calls
from latentflow.reasons import Reason
from latentflow.v1 import stage_pb2, stage_pb2_grpc

from latentflow_nodes.families.base import Residuals
from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.shared_memory import PageError

_log = structlog.get_logger()


Message = TypeVar("Message", stage_pb2.ResidualsRequest, stage_pb2.PredictNoiseRequest)
Answer = TypeVar("Answer")


class StepStream(ABC, Generic[Message, Answer]):
    """One request's stream to one peer.

    Use as an async context manager in the event loop; leaving it ends the stream and fails all open requests.
    """

    # What the peer is, in messages.
    _what: str

    def __init__(self, peers: Peers, peer: stage_pb2.Peer, opening: Message) -> None:
        self._peers = peers
        self._peer = peer
        self._opening: Message = opening
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[Message | None] = asyncio.Queue()
        # Requests without an answer; only the first of them has been sent.
        self._open: deque[tuple[Message, Future[Answer]]] = deque()
        # A step that is sent before the peer has accepted the opening message would hide the reason of a refusal: gRPC
        # reports the failed write in its place.
        self._opened = asyncio.Event()
        self._memory = peers.transport.memory
        self._ended: LatentflowError | None = None
        self._has_ended = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @abstractmethod
    def _call(self, stub: stage_pb2_grpc.StageStub, requests: AsyncIterator[Message]) -> Any:
        """The call whose answers the stream reads. Its deadline is that of the request."""

    @abstractmethod
    def _answer(self, bundle: Mapping[str, torch.Tensor]) -> Answer:
        """The answer to a step. KeyError where the bundle lacks a tensor."""

    async def __aenter__(self) -> Self:
        self._outgoing.put_nowait(self._opening)
        stub = stage_pb2_grpc.StageStub(self._peers.channel(self._peer.address))
        self._reader = asyncio.create_task(self._read(stub))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._end(UnavailableError("The request has ended.", reason=Reason.PEER_UNAVAILABLE))

    async def opened(self) -> None:
        """Returns when the peer has accepted the stream. Raises the error with which it ended before that."""
        await self._opened.wait()
        if self._ended is not None:
            raise self._ended

    async def ended(self) -> LatentflowError:
        """Waits for the end of the stream, and returns why it ended."""
        await self._has_ended.wait()
        assert self._ended is not None
        return self._ended

    def _request(self, message: Message) -> Future[Answer]:
        """Requests a step. May be called from any thread."""
        future: Future[Answer] = Future()
        self._loop.call_soon_threadsafe(self._send, message, future)
        return future

    def _send(self, message: Message, future: Future[Answer]) -> None:
        if self._ended is not None:
            future.set_exception(self._ended)
            return
        self._open.append((message, future))
        if self._opened.is_set() and len(self._open) == 1:
            self._send_first()

    def _send_first(self) -> None:
        message, _ = self._open[0]
        message.step.shared_memory = self._memory
        self._outgoing.put_nowait(message)

    async def _requests(self) -> AsyncIterator[Message]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _read(self, stub: stage_pb2_grpc.StageStub) -> None:
        transport = self._peers.transport
        receiver, started = transport.receiver(), 0.0
        try:
            async for response in self._call(stub, self._requests()):
                if response.opened:
                    self._opened.set()
                    if self._open:
                        self._send_first()
                    continue
                started = started or time.perf_counter()
                try:
                    whole = receiver.add(response.chunk)
                except PageError as error:
                    if not self._memory:
                        raise
                    _log.warning("page not readable; requesting bytes", step=response.step, problem=error.message)
                    self._memory = ""
                    self._send_first()
                    continue
                if not whole:
                    continue
                transport.count(receiver.kind, "receive", size=receiver.size, seconds=time.perf_counter() - started)
                bundle, receiver, started = receiver.tensors, transport.receiver(), 0.0
                answer = self._answer(bundle)
                _, future = self._open.popleft()
                future.set_result(answer)
                if self._open:
                    self._send_first()
        except grpc.RpcError as error:
            self._end(self._peers.peer_error(error, peer=self._peer, what=self._what))
        except (LatentflowError, KeyError, IndexError) as error:
            self._end(
                UnavailableError(f"The {self._what} sent an invalid answer: {error}", reason=Reason.PEER_UNAVAILABLE)
            )
        finally:
            self._end(UnavailableError(f"The {self._what} ended the stream.", reason=Reason.PEER_UNAVAILABLE))

    def _end(self, error: LatentflowError) -> None:
        self._ended = self._ended or error
        self._opened.set()
        self._has_ended.set()
        self._outgoing.put_nowait(None)
        while self._open:
            _, future = self._open.popleft()
            future.set_exception(self._ended)


class ResidualStream(StepStream[stage_pb2.ResidualsRequest, Residuals]):
    """One request's stream to one ControlNet; a `ResidualSource` for the engine."""

    _what = "ControlNet"

    def __init__(self, peers: Peers, ref: stage_pb2.ControlNetRef, opening: stage_pb2.ResidualsOpen) -> None:
        super().__init__(peers, ref.peer, stage_pb2.ResidualsRequest(open=opening))

    def request(self, *, step: int, timestep: float, sample: torch.Tensor, scale: float) -> Future[Residuals]:
        """Requests a step's residuals. May be called from any thread."""
        message = stage_pb2.ResidualsStep(step=step, timestep=timestep, sample=codec.inline(sample), scale=scale)
        return self._request(stage_pb2.ResidualsRequest(step=message))

    def _call(self, stub: stage_pb2_grpc.StageStub, requests: AsyncIterator[stage_pb2.ResidualsRequest]) -> Any:
        return stub.Residuals(requests, timeout=calls.remaining(), metadata=self._peers.metadata())

    def _answer(self, bundle: Mapping[str, torch.Tensor]) -> Residuals:
        return Residuals(down=tuple(bundle[f"down.{i}"] for i in range(len(bundle) - 1)), mid=bundle["mid"])


class NoiseStream(StepStream[stage_pb2.PredictNoiseRequest, torch.Tensor]):
    """One request's stream to its guidance peer; a `NoiseSource` for the engine."""

    _what = "guidance peer"

    def __init__(self, peers: Peers, peer: stage_pb2.Peer, opening: stage_pb2.PredictNoiseOpen) -> None:
        super().__init__(peers, peer, stage_pb2.PredictNoiseRequest(open=opening))
        self._adapters = range(len(opening.adapters))

    def request(self, *, step: int, timestep: float, sample: torch.Tensor, with_adapters: bool) -> Future[torch.Tensor]:
        """Requests a step's prediction, with all adapters in effect or none. May be called from any thread."""
        message = stage_pb2.PredictNoiseStep(
            step=step,
            timestep=timestep,
            sample=codec.inline(sample),
            adapters=self._adapters if with_adapters else (),
        )
        return self._request(stage_pb2.PredictNoiseRequest(step=message))

    def give_up(self, error: LatentflowError) -> None:
        """Ends the stream with an error. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._end, error)

    def _call(self, stub: stage_pb2_grpc.StageStub, requests: AsyncIterator[stage_pb2.PredictNoiseRequest]) -> Any:
        return stub.PredictNoise(requests, timeout=calls.remaining(), metadata=self._peers.metadata())

    def _answer(self, bundle: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return bundle["noise"]

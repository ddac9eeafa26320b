"""A denoiser's exchange with one ControlNet, on one gRPC stream for the whole request.

The engine's thread requests a step's residuals and gets a future; the event loop sends, receives and resolves it. A
request is sent after the one before it was answered, because the ControlNet may write the answer to the same page of
shared memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from types import TracebackType

import grpc
import structlog
import torch
from latentflow.errors import LatentflowError, UnavailableError
from latentflow.reasons import Reason
from latentflow.v1 import stage_pb2, stage_pb2_grpc

from latentflow_nodes.families.base import Residuals
from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.shared_memory import PageError

_log = structlog.get_logger()


class ResidualStream:
    """One request's stream to one ControlNet; a `ResidualSource` for the engine.

    Use as an async context manager in the event loop; leaving it ends the stream and fails all open requests.
    """

    def __init__(self, peers: Peers, ref: stage_pb2.ControlNetRef, opening: stage_pb2.ResidualsOpen) -> None:
        self._peers = peers
        self._ref = ref
        self._opening = opening
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[stage_pb2.ResidualsRequest | None] = asyncio.Queue()
        # Requests without an answer; only the first of them has been sent.
        self._open: deque[tuple[stage_pb2.ResidualsRequest, Future[Residuals]]] = deque()
        # A step that is sent before the ControlNet has accepted the opening message would hide the reason of a refusal:
        # gRPC reports the failed write in its place.
        self._opened = False
        self._memory = peers.transport.memory
        self._ended: LatentflowError | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ResidualStream:
        self._outgoing.put_nowait(stage_pb2.ResidualsRequest(open=self._opening))
        stub = stage_pb2_grpc.StageStub(self._peers.channel(self._ref.peer.address))
        self._reader = asyncio.create_task(self._read(stub))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._end(UnavailableError("The request has ended.", reason=Reason.PEER_UNAVAILABLE))

    def request(self, *, step: int, timestep: float, sample: torch.Tensor, scale: float) -> Future[Residuals]:
        """Requests a step's residuals. May be called from any thread."""
        future: Future[Residuals] = Future()
        message = stage_pb2.ResidualsRequest(
            step=stage_pb2.ResidualsStep(step=step, timestep=timestep, sample=codec.inline(sample), scale=scale)
        )
        self._loop.call_soon_threadsafe(self._send, message, future)
        return future

    def _send(self, message: stage_pb2.ResidualsRequest, future: Future[Residuals]) -> None:
        if self._ended is not None:
            future.set_exception(self._ended)
            return
        self._open.append((message, future))
        if self._opened and len(self._open) == 1:
            self._send_first()

    def _send_first(self) -> None:
        message, _ = self._open[0]
        message.step.shared_memory = self._memory
        self._outgoing.put_nowait(message)

    async def _requests(self) -> AsyncIterator[stage_pb2.ResidualsRequest]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _read(self, stub: stage_pb2_grpc.StageStub) -> None:
        transport = self._peers.transport
        receiver, started = transport.receiver(), 0.0
        try:
            async for response in stub.Residuals(self._requests(), metadata=self._peers.metadata()):
                if response.opened:
                    self._opened = True
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
                down = tuple(bundle[f"down.{i}"] for i in range(len(bundle) - 1))
                _, future = self._open.popleft()
                future.set_result(Residuals(down=down, mid=bundle["mid"]))
                if self._open:
                    self._send_first()
        except grpc.RpcError as error:
            self._end(self._peers.peer_error(error, peer=self._ref.peer, what="ControlNet"))
        except (LatentflowError, KeyError, IndexError) as error:
            self._end(
                UnavailableError(f"The ControlNet sent an invalid answer: {error}", reason=Reason.PEER_UNAVAILABLE)
            )
        finally:
            self._end(UnavailableError("The ControlNet ended the stream.", reason=Reason.PEER_UNAVAILABLE))

    def _end(self, error: LatentflowError) -> None:
        self._ended = self._ended or error
        self._outgoing.put_nowait(None)
        while self._open:
            _, future = self._open.popleft()
            future.set_exception(self._ended)

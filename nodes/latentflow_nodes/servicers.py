"""The server's side of the wire: decodes a message, calls the role or the store, encodes the answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any, TypeVar

from latentflow.errors import FailedPreconditionError, InvalidRequestError
from latentflow.internal import rpc, unserved
from latentflow.reasons import Reason
from latentflow.v1 import (
    control_pb2,
    control_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
    tensors_pb2,
    tensors_pb2_grpc,
)

from latentflow_nodes import roles
from latentflow_nodes.calls import Calls, streaming, unary
from latentflow_nodes.context import Context
from latentflow_nodes.engine.device_memory import DeviceMemory, measure
from latentflow_nodes.roles import Role
from latentflow_nodes.sleeping import Sleeping

T = TypeVar("T", stage_pb2.DenoiseRequest, stage_pb2.ResidualsRequest, stage_pb2.PredictNoiseRequest)


class StageServicer(stage_pb2_grpc.StageServicer):
    """The calls of the server's role; those of other roles are UNIMPLEMENTED."""

    def __init__(self, role: Role, calls: Calls) -> None:
        self._role = role
        self.calls = calls

    @unary
    async def Encode(self, request: stage_pb2.EncodeRequest) -> Any:
        unserved.refuse(request)
        return await self._role.encode(request)

    @streaming
    async def Denoise(self, requests: AsyncIterator[stage_pb2.DenoiseRequest]) -> AsyncIterator[Any]:
        accepted = _accepted(requests)
        first = await anext(accepted, stage_pb2.DenoiseRequest())
        if first.WhichOneof("message") != "open":
            raise InvalidRequestError("The first message of a Denoise stream must be `open`.")
        async for event in self._role.denoise(first.open, accepted):
            yield event

    @unary
    async def Decode(self, request: stage_pb2.DecodeRequest) -> Any:
        unserved.refuse(request)
        return await self._role.decode(request)

    @streaming
    async def Adapter(self, request: stage_pb2.AdapterRequest) -> AsyncIterator[Any]:
        for chunk in await self._role.adapter(request):
            yield stage_pb2.AdapterResponse(chunk=chunk)

    @streaming
    async def Residuals(self, requests: AsyncIterator[stage_pb2.ResidualsRequest]) -> AsyncIterator[Any]:
        async for response in self._role.residuals(_accepted(requests)):
            yield response

    @streaming
    async def PredictNoise(self, requests: AsyncIterator[stage_pb2.PredictNoiseRequest]) -> AsyncIterator[Any]:
        async for response in self._role.predict_noise(_accepted(requests)):
            yield response


async def _accepted(requests: AsyncIterator[T]) -> AsyncIterator[T]:
    """The messages of a stream. UnimplementedError at one that sets a field which this version does not serve."""
    async for request in requests:
        # The messages of single steps have no such field, and their tensors would be copied here.
        if request.WhichOneof("message") != "step":
            unserved.refuse(request)
        yield request


class TensorsServicer(tensors_pb2_grpc.TensorsServicer):
    """The held tensors. Served while the server drains, because consumers may still need its results."""

    calls = None

    def __init__(self, context: Context) -> None:
        self._context = context

    @streaming
    async def Fetch(self, request: tensors_pb2.FetchRequest) -> AsyncIterator[Any]:
        for key in request.ids:
            held = self._context.store.get(boot_id=request.boot_id, key=key)
            for chunk in held.sender.pieces({"tensor": held.tensor}, memory=request.shared_memory):
                yield tensors_pb2.FetchResponse(chunk=chunk)

    @unary
    async def Renew(self, request: tensors_pb2.RenewRequest) -> Any:
        store = self._context.store
        lost = store.renew(boot_id=request.boot_id, keys=request.ids)
        return tensors_pb2.RenewResponse(lease=store.lease(), lost=lost)

    @unary
    async def Release(self, request: tensors_pb2.ReleaseRequest) -> Any:
        released = self._context.store.release(boot_id=request.boot_id, keys=request.ids, request_id=request.request_id)
        return tensors_pb2.ReleaseResponse(released=released)


class ControlServicer(control_pb2_grpc.ControlServicer):
    """Description and load of the server, and the calls that put it to sleep, wake it and drain it."""

    calls = None

    def __init__(self, context: Context, role: Role, sleeping: Sleeping, drain: Callable[[float], Any]) -> None:
        self._context = context
        self._role = role
        self._sleeping = sleeping
        self._drain = drain

    @unary
    async def Describe(self, request: control_pb2.DescribeRequest) -> Any:
        caller_version = request.protocol_version
        if abs(caller_version - rpc.PROTOCOL_VERSION) > 1:
            raise FailedPreconditionError(
                f"The caller speaks protocol {caller_version}, this server {rpc.PROTOCOL_VERSION}; they may differ by "
                "one version at most. Upgrade the older one.",
                reason=Reason.PROTOCOL_MISMATCH,
            )
        settings = self._context.settings
        response = control_pb2.DescribeResponse(
            protocol_version=rpc.PROTOCOL_VERSION,
            role=roles.wire(settings.role),
            family=self._role.family,
            content_digest=self._role.content_digest,
            boot_id=self._context.store.boot_id,
            model=settings.identity,
            version=version("latentflow"),
            max_running=settings.engine.max_running,
            max_queued=settings.engine.max_waiting,
            dtype=settings.dtype,
            devices=self._devices(),
        )
        self._role.describe(response)
        return response

    @streaming
    async def WatchLoad(self, request: control_pb2.WatchLoadRequest) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._context.load.watch()) as states:
            async for state in states:
                yield control_pb2.WatchLoadResponse(
                    running=state.running,
                    queued=state.queued,
                    pass_times=[
                        control_pb2.PassTime(rows=size.rows, height=size.height, width=size.width, seconds=seconds)
                        for size, seconds in state.pass_seconds.items()
                    ],
                    awake=state.is_awake,
                    epoch=state.epoch,
                    draining=state.is_draining,
                    nets=state.nets,
                    devices=self._devices(),
                )

    @unary
    async def Sleep(self, request: control_pb2.SleepRequest) -> Any:
        result = await self._sleeping.sleep(request.epoch, grace=self._grace(request))
        response = control_pb2.SleepResponse(devices=self._devices(result.memory))
        response.duration.FromNanoseconds(int(result.seconds * 1e9))
        return response

    @unary
    async def Wake(self, request: control_pb2.WakeRequest) -> Any:
        result = await self._sleeping.wake(request.epoch)
        response = control_pb2.WakeResponse(devices=self._devices(result.memory))
        response.duration.FromNanoseconds(int(result.seconds * 1e9))
        return response

    @unary
    async def Drain(self, request: control_pb2.DrainRequest) -> Any:
        await self._drain(self._grace(request))
        return control_pb2.DrainResponse()

    def _grace(self, request: control_pb2.DrainRequest | control_pb2.SleepRequest) -> float:
        """Seconds that running calls may take; the server's own limit where the request has none."""
        if not request.HasField("grace"):
            return self._context.settings.drain
        return float(request.grace.ToTimedelta().total_seconds())

    def _devices(self, memory: DeviceMemory | None = None) -> list[control_pb2.Device]:
        """The devices of the ranks: that of this process as it was measured or is now, the others by their kind."""
        memory = memory or measure(self._context.device)
        return [
            control_pb2.Device(
                kind=memory.kind,
                uuid=memory.uuid,
                name=memory.name,
                total_bytes=memory.total,
                free_bytes=memory.free,
                used_bytes=memory.used,
                weights_bytes=self._role.weights_bytes,
                awake_peak_bytes=memory.peak,
                asleep_bytes=self._sleeping.asleep_bytes,
            ),
            *(control_pb2.Device(kind=device.partition(":")[0]) for device in self._context.settings.devices[1:]),
        ]

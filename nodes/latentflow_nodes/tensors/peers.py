"""This server's connections to its peers: tensors it pulls, adapters it pulls, streams it opens.

A server dials only the addresses that a request names. Channels are kept and reused. Every failure of a call becomes an
error on which the gateway can act: on OWNER_LOST it produces the tensor again, on PEER_UNAVAILABLE it retries with another
peer.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import TracebackType

import grpc
import grpc.aio
import structlog
import torch
from latentflow.errors import DeadlineError, LatentflowError, OwnerLostError, UnavailableError
from latentflow.internal import hosts, rpc, status
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason
from latentflow.v1 import stage_pb2, stage_pb2_grpc, tensors_pb2, tensors_pb2_grpc

from latentflow_nodes.adapters.cache import AdapterCache
from latentflow_nodes.adapters.layers import Layers, unpack_layers
from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.shared_memory import PageError
from latentflow_nodes.tensors.transfer import Transport

_log = structlog.get_logger()
_ADAPTER_CACHE_BYTES = 1 << 30
_FETCH_SECONDS = 60.0
_ADAPTER_SECONDS = 300.0


class Peers:
    """Channels to other servers.

    Args:
        token: Sent as bearer token.
        tls: Credentials of this side; None for plain connections.
        transport: Makes the receivers.
    """

    def __init__(self, *, token: str | None, tls: rpc.Tls | None, transport: Transport, metrics: Instruments) -> None:
        self._token = token
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._metrics = metrics
        self.transport = transport
        self._adapters = AdapterCache(_ADAPTER_CACHE_BYTES)

    async def __aenter__(self) -> Peers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._adapters.close()
        for channel in self._channels.values():
            await channel.close(grace=None)

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel to an address, created at its first use. InvalidRequestError where it is not host:port."""
        if address not in self._channels:
            hosts.split(address)
            self._channels[address] = rpc.channel(address, tls=self._tls)
        return self._channels[address]

    def metadata(self) -> list[tuple[str, str]]:
        """Metadata of a call to a peer: the token, and the trace and request id of the current task."""
        bound = structlog.contextvars.get_contextvars()
        trace = rpc.Trace.parse(bound.get("traceparent"))
        return rpc.metadata(
            token=self._token, trace=trace.child() if trace else None, request_id=bound.get("request_id")
        )

    async def conditioning(
        self, tensors: Mapping[str, tensors_pb2.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The values of named tensor messages. OwnerLostError where an owner has ended or no longer holds one."""
        pulled = await self._pulled(tensors)
        return {name: pulled[name].to(device) for name in tensors}

    async def fetch(self, tensor: tensors_pb2.Tensor, *, name: str) -> torch.Tensor:
        """The values of a tensor message. OwnerLostError where its owner has ended or no longer holds it."""
        return (await self._pulled({name: tensor}))[name]

    async def _pulled(self, tensors: Mapping[str, tensors_pb2.Tensor]) -> dict[str, torch.Tensor]:
        """One call to each owner, because a call costs more than the values of a small tensor."""
        pulled = {}
        held: defaultdict[tuple[str, str], dict[str, bytes]] = defaultdict(dict)
        for name, tensor in tensors.items():
            if tensor.WhichOneof("content") == "inline":
                pulled[name] = codec.from_inline(tensor)
            else:
                held[tensor.handle.owner, tensor.handle.boot_id][name] = tensor.handle.id
        for part in await asyncio.gather(*(self._fetched(*owner, ids) for owner, ids in held.items())):
            pulled |= part
        return pulled

    async def _fetched(self, owner: str, boot_id: str, ids: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
        try:
            return await self._fetch(owner, boot_id, ids, memory=self.transport.memory)
        except PageError as error:
            _log.warning("page not readable; fetching bytes instead", tensors=list(ids), problem=error.message)
            return await self._fetch(owner, boot_id, ids, memory="")

    async def _fetch(
        self, owner: str, boot_id: str, ids: Mapping[str, bytes], *, memory: str
    ) -> dict[str, torch.Tensor]:
        stub = tensors_pb2_grpc.TensorsStub(self.channel(owner))
        request = tensors_pb2.FetchRequest(boot_id=boot_id, ids=ids.values(), shared_memory=memory)
        started = time.perf_counter()
        lacking = list(ids)
        fetched: dict[str, torch.Tensor] = {}
        receiver = self.transport.receiver()
        try:
            async for response in stub.Fetch(request, timeout=_FETCH_SECONDS, metadata=self.metadata()):
                if receiver.add(response.chunk) and lacking and "tensor" in receiver.tensors:
                    fetched[lacking.pop(0)] = receiver.tensors["tensor"]
                    ended = time.perf_counter()
                    self.transport.count(receiver.kind, "receive", size=receiver.size, seconds=ended - started)
                    started, receiver = ended, self.transport.receiver()
        except grpc.aio.AioRpcError as error:
            known = status.error_of_peer(error)
            # The deadline is this call's own and not the request's: an owner that does not answer has lost the tensor, too.
            if isinstance(known, OwnerLostError | UnavailableError | DeadlineError):
                name = lacking[0] if lacking else next(iter(ids))
                raise OwnerLostError(
                    f"The tensor {name!r} is lost with its owner {owner}: {known.message}",
                    details={"owner": owner, "tensor": name},
                ) from None
            raise known from None
        if lacking:
            raise OwnerLostError(
                f"{owner} sent an incomplete tensor {lacking[0]!r}.", details={"owner": owner, "tensor": lacking[0]}
            )
        return fetched

    async def adapters(self, refs: Sequence[stage_pb2.AdapterRef], component: str) -> list[tuple[Layers, float]]:
        """One component's part of every adapter, with its weight, in the request's order."""
        return list(
            zip(
                await asyncio.gather(*(self._adapter(ref, component) for ref in refs)),
                [ref.weight for ref in refs],
                strict=True,
            )
        )

    def drop_adapters(self) -> None:
        """Frees the memory of the adapters that were pulled."""
        self._adapters.clear()

    async def _adapter(self, ref: stage_pb2.AdapterRef, component: str) -> Layers:
        if not ref.digest:
            return await self._pull(ref, component)
        return await self._adapters.get(
            ref.digest, component, store=ref.store.address, pull=lambda: self._pull(ref, component)
        )

    async def _pull(self, ref: stage_pb2.AdapterRef, component: str) -> Layers:
        stub = stage_pb2_grpc.StageStub(self.channel(ref.store.address))
        bound = structlog.contextvars.get_contextvars()
        request = stage_pb2.AdapterRequest(
            request_id=bound.get("request_id", ""), name=ref.name, component=component, digest=ref.digest
        )
        started = time.perf_counter()
        receiver = self.transport.receiver()
        try:
            async for response in stub.Adapter(request, timeout=_ADAPTER_SECONDS, metadata=self.metadata()):
                receiver.add(response.chunk)
        except grpc.aio.AioRpcError as error:
            raise self.peer_error(error, peer=ref.store, what="LoRA store") from None
        seconds = time.perf_counter() - started
        self.transport.count(receiver.kind, "receive", size=receiver.size, seconds=seconds)
        self._metrics.of("latentflow_loads_total", kind="adapter").inc()
        self._metrics.of("latentflow_load_seconds_total", kind="adapter").inc(seconds)
        return unpack_layers(receiver.tensors)

    @staticmethod
    def peer_error(error: grpc.RpcError, *, peer: stage_pb2.Peer, what: str) -> LatentflowError:
        """A failed call to a peer as the error that the gateway acts on."""
        known = status.error_of_peer(error)
        if isinstance(known, UnavailableError) and known.reason != Reason.ADAPTER_CHANGED:
            return UnavailableError(
                f"The {what} {peer.model or '?'} at {peer.address} cannot be reached: {known.message}",
                reason=Reason.PEER_UNAVAILABLE,
                details={"peer": peer.address, "model": peer.model},
            )
        return known

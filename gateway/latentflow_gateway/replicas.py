"""The replicas of every model: which of them are ready, and the descriptions of their models.

Follows the directory and watches each replica's health. `acquire` reserves a ready replica for one attempt of a stage. The
last description of a model stays known while it has no ready replica. What changes without a call of the gateway is read
again every few seconds: the files of LoRA stores, and which nets of a ControlNet are on the device.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latentflow.api.types import Latent
from latentflow.errors import UnavailableError
from latentflow.internal import hosts, rpc
from latentflow.internal.directory import Directory
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2

from latentflow_gateway.loans import Loan

# Name, digest and weight of each adapter, in the order of a request.
AdapterSet: TypeAlias = tuple[tuple[str, str, float], ...]

_log = structlog.get_logger()
_STAGE = stage_pb2.DESCRIPTOR.services_by_name["Stage"].full_name
_RECONNECT_SECONDS = 0.1
_DESCRIBE_SECONDS = 10.0
_REREAD_SECONDS = 2.0


class Replica:
    """One server of a model.

    Attributes:
        outstanding: Its own requests.
        loans: Requests of other replicas that it is lent to.
        adapters: The adapter set of the last request that it got from this gateway; empty: none.
        nets: Nets of a ControlNet that are on its device, as it reported last, and those that this gateway has requested since.
    """

    def __init__(self, *, identity: str, address: str, channel: grpc.aio.Channel) -> None:
        self.identity = identity
        self.address = address
        self.channel = channel
        self.ready = False
        self.outstanding = 0
        self.loans: set[Loan] = set()
        self.adapters: AdapterSet = ()
        self.nets: frozenset[str] = frozenset()
        self._watch: Any = None

    @property
    def demand(self) -> tuple[int, int]:
        """Requests that it computes for: those that stay, then those from which it can be taken back."""
        revocable = sum(loan.is_revocable for loan in self.loans)
        return self.outstanding + len(self.loans) - revocable, revocable

    def take_back(self) -> None:
        """Ends the loans that a request of its own ends."""
        for loan in [loan for loan in self.loans if loan.is_revocable]:
            loan.take_back()

    def suspect(self) -> None:
        """Counts as not ready until its health has been checked anew; for a replica that did not answer a call."""
        self.ready = False
        if self._watch is not None:
            self._watch.cancel()

    async def states(self) -> AsyncIterator[bool]:
        """Whether it admits requests, now and at every change; ends with the connection. A sleeping server does not."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        self._watch = watch = stub.Watch(health_pb2.HealthCheckRequest(service=_STAGE), wait_for_ready=False)
        async for response in watch:
            yield response.status == health_pb2.HealthCheckResponse.SERVING


class Replicas:
    """Every replica of a directory. An async context manager, which waits for the first directory.

    Args:
        directories: The directory, now and at every change.
        token: Sent to the servers as bearer token.
        tls: For connections to the servers; None: without TLS.
    """

    def __init__(
        self,
        *,
        directories: AsyncIterator[Directory],
        token: str | None,
        tls: rpc.Tls | None,
        metrics: Instruments,
    ) -> None:
        self._directories = directories
        self._token = token
        self._tls = tls
        self._metrics = metrics
        self._changed = asyncio.Condition()
        self._replicas: dict[tuple[str, str], Replica] = {}
        self._watchers: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._followers: list[asyncio.Task[None]] = []
        self.directory = Directory()
        self.descriptions: dict[str, control_pb2.DescribeResponse] = {}

    async def __aenter__(self) -> Replicas:
        self._apply(await anext(self._directories))
        self._followers = [asyncio.create_task(self._follow()), asyncio.create_task(self._reread())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._followers, *self._watchers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._replicas.values():
            await replica.channel.close(grace=None)

    def ready(self, identity: str) -> list[Replica]:
        """Ready replicas of a model, those with the least demand first."""
        own = [r for r in self._replicas.values() if r.identity == identity and r.ready]
        return sorted(own, key=lambda replica: replica.demand)

    def find(self, address: str) -> Replica | None:
        """The replica at an address."""
        return next((r for r in self._replicas.values() if r.address == address), None)

    async def pick(
        self,
        identity: str,
        *,
        seconds: float,
        near: str | None = None,
        adapters: AdapterSet = (),
        net: str | None = None,
    ) -> Replica:
        """The ready replica that is `preferred`; waits for one.

        UnavailableError, reason MODEL_NOT_READY, when none is ready within `seconds`.
        """
        await self.wait_ready([identity], seconds=seconds)
        return preferred(self.ready(identity), near=near, adapters=adapters, net=net)

    @contextlib.asynccontextmanager
    async def acquire(
        self,
        identity: str,
        *,
        seconds: float,
        near: str | None = None,
        adapters: AdapterSet = (),
        net: str | None = None,
    ) -> AsyncIterator[Replica]:
        """As `pick`; the request counts as outstanding while entered. The replica is taken back from others' requests."""
        replica = await self.pick(identity, seconds=seconds, near=near, adapters=adapters, net=net)
        replica.outstanding += 1
        replica.adapters = adapters
        if net is not None:
            replica.nets |= {net}
        replica.take_back()
        try:
            yield replica
        finally:
            replica.outstanding -= 1

    @contextlib.contextmanager
    def borrow(self, identity: str, *, beside: Replica, latent: Latent) -> Iterator[Loan | None]:
        """A loan of the replica that `spare` finds among the ready ones, which ends when it is left, if not before.

        With Auto the replica is taken back when it gets a request of its own.
        """
        peer = spare(self.ready(identity), beside=beside, latent=latent)
        if peer is None:
            yield None
            return
        loan = Loan(peer, is_revocable=latent == "Auto")
        try:
            yield loan
        finally:
            loan.end()

    async def wait_ready(self, identities: Collection[str], *, seconds: float) -> None:
        """Waits until every model has a ready replica, whose description is then known.

        All models without one count as held meanwhile, so that they start at the same time. UnavailableError, reason
        MODEL_NOT_READY, where one has none within `seconds`.
        """
        waiting = [identity for identity in identities if not self.ready(identity)]
        if not waiting:
            return
        try:
            with contextlib.ExitStack() as held:
                for identity in waiting:
                    held.enter_context(self._metrics.of("latentflow_gateway_held", model=identity).track_inprogress())
                async with asyncio.timeout(seconds), self._changed:
                    await self._changed.wait_for(lambda: all(map(self.ready, waiting)))
        except TimeoutError:
            late = next((identity for identity in waiting if not self.ready(identity)), waiting[0])
            raise UnavailableError(
                f"Model {late} has had no ready replica for {seconds:.0f} s: its servers are starting, or they fail. See "
                "their logs.",
                reason=Reason.MODEL_NOT_READY,
                details={"model": late},
                retry_after=1.0,
            ) from None

    async def _follow(self) -> None:
        async for directory in self._directories:
            self._apply(directory)

    async def _reread(self) -> None:
        while True:
            await asyncio.sleep(_REREAD_SECONDS)
            ready = [replica for replica in self._replicas.values() if replica.ready]
            described = [(replica, self.descriptions[replica.identity]) for replica in ready]
            stores = [one for one, description in described if description.role == control_pb2.ROLE_LORA_STORE]
            with_nets = [one for one, description in described if len(description.control_net.nets) > 1]
            # A server that does not answer is left to the watch of its health.
            await asyncio.gather(*map(self._describe, stores), *map(self._read_nets, with_nets), return_exceptions=True)

    async def _read_nets(self, replica: Replica) -> None:
        call = control_pb2_grpc.ControlStub(replica.channel).WatchLoad(
            control_pb2.WatchLoadRequest(), timeout=_DESCRIBE_SECONDS, metadata=self._metadata()
        )
        async for load in call:
            replica.nets = frozenset(load.nets)
            break
        call.cancel()

    def _metadata(self) -> list[tuple[str, str]]:
        return rpc.metadata(token=self._token, trace=None, request_id=None)

    def _apply(self, directory: Directory) -> None:
        self.directory = directory
        wanted = {(identity, a) for identity, model in self.directory.models.items() for a in model.replicas}
        for key in self._replicas.keys() - wanted:
            self._watchers.pop(key).cancel()
            self._replicas.pop(key).ready = False
            self._count(key[0])
        for identity, address in wanted - self._replicas.keys():
            replica = Replica(identity=identity, address=address, channel=rpc.channel(address, tls=self._tls))
            self._replicas[identity, address] = replica
            self._watchers[identity, address] = asyncio.create_task(self._watch(replica))

    async def _watch(self, replica: Replica) -> None:
        while True:
            try:
                async for serves in replica.states():
                    if serves:
                        await self._describe(replica)
                    await self._set(replica, serves)
            except grpc.RpcError:
                # The server is unreachable: set as not ready below, and tried again.
                pass
            except asyncio.CancelledError:
                # `suspect` cancels the call only; anything else cancels this task.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
            await self._set(replica, False)
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _describe(self, replica: Replica) -> None:
        description = await control_pb2_grpc.ControlStub(replica.channel).Describe(
            control_pb2.DescribeRequest(protocol_version=rpc.PROTOCOL_VERSION),
            timeout=_DESCRIBE_SECONDS,
            metadata=self._metadata(),
        )
        known = self.descriptions.get(replica.identity)
        differs = known is not None and known.content_digest != description.content_digest
        if differs and description.role == control_pb2.ROLE_LORA_STORE:
            _log.info("LoRA store has changed", model=replica.identity, replica=replica.address)
        elif differs:
            _log.warning(
                "replica has other weights than the replica before it", model=replica.identity, replica=replica.address
            )
        self.descriptions[replica.identity] = description

    async def _set(self, replica: Replica, ready: bool) -> None:
        if replica.ready != ready:
            _log.info(
                "replica is ready" if ready else "replica is not ready", model=replica.identity, at=replica.address
            )
        async with self._changed:
            replica.ready = ready
            self._changed.notify_all()
        self._count(replica.identity)

    def _count(self, identity: str) -> None:
        self._metrics.of("latentflow_gateway_replicas_ready", model=identity).set(len(self.ready(identity)))


def preferred(
    ready: Sequence[Replica], *, near: str | None, adapters: AdapterSet = (), net: str | None = None
) -> Replica:
    """The replica that gets the next request.

    Of the replicas with the least demand, one that had the same adapter set before is preferred, because it may hold it
    merged; then one that had no adapters, so that other sets stay where they are. In the same way one is preferred that has the
    net on its device; then the one that has the fewest there.

    Args:
        ready: At least one.
        near: Address of a server that will exchange tensors with it. A replica on the same host, which in a cluster is the
            same pod, is preferred to all others.
        adapters: The adapter set of the request.
        net: The net of a ControlNet that the request needs; None: the replica is of no ControlNet.
    """

    def order(replica: Replica) -> tuple[object, ...]:
        is_elsewhere = near is None or _host(replica.address) != _host(near)
        of_adapters = replica.adapters != adapters, bool(replica.adapters)
        return is_elsewhere, replica.demand, of_adapters, net not in replica.nets, len(replica.nets)

    return min(ready, key=order)


def spare(ready: Sequence[Replica], *, beside: Replica, latent: Latent) -> Replica | None:
    """Another replica that may share a request with `beside`; None where there is none.

    Args:
        ready: Those with the least demand first.
        latent: The degree of latent parallelism. 2: any other replica; Auto: one without demand.
    """
    if latent == 1:
        return None
    others = (one for one in ready if one is not beside)
    return next((one for one in others if latent == 2 or not any(one.demand)), None)


def _host(address: str) -> str:
    return hosts.split(address)[0]

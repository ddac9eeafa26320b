"""The model server's process: loads the role, serves it, drains at SIGTERM.

`main` is the command `latentflow-node`; `serve` runs one server inside an event loop, for tests and embedding.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from latentflow.internal import hosts, logs, reflecting, rpc, serving
from latentflow.internal.metrics import NODE, Instruments
from latentflow.v1 import (
    control_pb2,
    control_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
    tensors_pb2,
    tensors_pb2_grpc,
)

from latentflow_nodes import roles, settings
from latentflow_nodes.calls import Calls, TokenInterceptor
from latentflow_nodes.context import Context
from latentflow_nodes.engine import malloc, threads
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.load import Load
from latentflow_nodes.servicers import ControlServicer, StageServicer, TensorsServicer
from latentflow_nodes.settings import NodeSettings
from latentflow_nodes.sleeping import Sleeping
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.shared_memory import Memory
from latentflow_nodes.tensors.store import TensorStore
from latentflow_nodes.tensors.transfer import Transport

_log = structlog.get_logger()
_SWEEP_SECONDS = 1.0
_STAGE = stage_pb2.DESCRIPTOR.services_by_name["Stage"].full_name
_SERVICES = (
    _STAGE,
    tensors_pb2.DESCRIPTOR.services_by_name["Tensors"].full_name,
    control_pb2.DESCRIPTOR.services_by_name["Control"].full_name,
)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, kw_only=True)
class Node:
    """A running server."""

    address: str
    metrics_port: int
    context: Context
    health: health.aio.HealthServicer
    calls: Calls

    async def report(self, is_admitting: bool) -> None:
        """Reports whether the server is awake, in the health of its Stage service alone: its process is ready in any case."""
        admits = is_admitting and not self.context.load.is_draining
        await self.health.set(_STAGE, _SERVING if admits else _NOT_SERVING)

    async def drain(self, grace: float) -> None:
        """Admits no new requests; waits at most `grace` seconds for the running ones and for tensors that peers still need."""
        await _set_health(self.health, _NOT_SERVING)
        self.context.load.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self.calls.running.drained()
                await self.context.store.emptied()


@contextlib.asynccontextmanager
async def serve(node: NodeSettings) -> AsyncIterator[Node]:
    """A server that is loaded, warmed up and ready when entered. LatentflowError where its model cannot be served."""
    metrics = Instruments(NODE, model=node.identity or node.uri, role=node.role)
    for call in roles.calls(node.role):
        # Created now, so that rates include the first requests.
        metrics.of("latentflow_requests_started_total", call=call)
        metrics.of("latentflow_requests_total", call=call, code="OK")
    server = grpc.aio.server(
        options=list(rpc.SERVER_OPTIONS), interceptors=[TokenInterceptor(node.token)] if node.token else []
    )
    bound = serving.bind(server, node.listen, tls=node.tls)
    # Kubernetes gives the address of an IPv6 pod without brackets.
    address = hosts.join(*hosts.split(node.advertise)) if node.advertise else bound
    started = time.perf_counter()
    metrics_port = serving.serve_metrics(metrics, node.metrics)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(metrics.close)
        memory = Memory(node.shared_memory) if node.shared_memory else None
        if memory:
            stack.callback(memory.close)
        transport = Transport(memory=memory, metrics=metrics)
        peers = await stack.enter_async_context(
            Peers(token=node.token, tls=node.tls, transport=transport, metrics=metrics)
        )
        store = TensorStore(
            address=address, lease=node.lease, clock=time.monotonic, transport=transport, metrics=metrics
        )
        stack.callback(store.close)
        compute_lock = ComputeLock(node.compute_lock)
        stack.callback(compute_lock.close)
        context = Context(
            settings=node,
            metrics=metrics,
            load=Load(metrics),
            transport=transport,
            store=store,
            peers=peers,
            compute_lock=compute_lock,
        )
        role = roles.load(context)
        stack.callback(role.close)
        await role.warm_up()
        metrics.of("latentflow_loads_total", kind="model").inc()
        metrics.of("latentflow_load_seconds_total", kind="model").inc(time.perf_counter() - started)
        calls = Calls(metrics)
        running = Node(
            address=address,
            metrics_port=metrics_port,
            context=context,
            health=health.aio.HealthServicer(),
            calls=calls,
        )
        stage_pb2_grpc.add_StageServicer_to_server(StageServicer(role, calls), server)
        tensors_pb2_grpc.add_TensorsServicer_to_server(TensorsServicer(context), server)
        sleeping = Sleeping(context, role, running=calls.running, report=running.report)
        stack.push_async_callback(sleeping.close)
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(context, role, sleeping, running.drain), server)
        health_pb2_grpc.add_HealthServicer_to_server(running.health, server)
        reflecting.enable(server, (*_SERVICES, health.SERVICE_NAME))
        await _set_health(running.health, _SERVING)
        await server.start()
        stack.push_async_callback(server.stop, 1.0)
        sweeper = asyncio.create_task(_sweep(store, memory))
        stack.callback(sweeper.cancel)
        metrics.of("latentflow_ready").set(1)
        _log.info("ready", address=address, metrics_port=metrics_port, seconds=time.perf_counter() - started)
        yield running


async def run(node: NodeSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    # A server that still downloads or loads has nothing to drain, and the next one resumes its download.
    serving.exit_at_signals()
    threads.compute_alone_in_executor()
    async with serve(node) as running:
        # The garbage collector need not walk the objects of the imported modules during a request.
        gc.freeze()
        await serving.stop_signal().wait()
        _log.info("draining")
        await running.drain(node.drain)
    _log.info("stopped")


def main(argv: list[str] | None = None) -> None:
    """The command `latentflow-node`. Exits 2 with one line where the model cannot be served with its settings."""
    node = settings.parse(argv)
    logs.configure(process=node.identity or node.role, form=node.log_format)
    threads.compute_with(1)
    malloc.keep_freed_memory()
    serving.run("latentflow-node", run(node))


async def _set_health(servicer: health.aio.HealthServicer, state: health_pb2.HealthCheckResponse.ServingStatus) -> None:
    for service in ("", *_SERVICES):
        await servicer.set(service, state)


async def _sweep(store: TensorStore, memory: Memory | None) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        if freed := store.sweep():
            _log.warning("leases expired without a release", tensors=freed)
        if memory:
            memory.sweep()


if __name__ == "__main__":
    main()

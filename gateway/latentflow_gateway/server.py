"""The gateway's process: follows the directory, serves gRPC and HTTP, drains at SIGTERM.

`main` is the command `latentflow-gateway`; `serve` runs one gateway inside an event loop, for tests and embedding.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from latentflow.internal import logs, reflecting, rpc, serving
from latentflow.internal.directory import Directory
from latentflow.internal.metrics import GATEWAY, Instruments
from latentflow.v1 import generation_pb2, generation_pb2_grpc

from latentflow_gateway import directory_file
from latentflow_gateway import settings as settings_module
from latentflow_gateway.api_keys import ApiKeys, KeyInterceptor
from latentflow_gateway.generation import Generation
from latentflow_gateway.http.app import HttpApi
from latentflow_gateway.http.server import HttpServer
from latentflow_gateway.replicas import Replicas
from latentflow_gateway.servicers import GenerationServicer
from latentflow_gateway.settings import GatewaySettings

_log = structlog.get_logger()
SERVICE: str = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A running gateway. `http` is None where it does not serve HTTP."""

    address: str
    metrics_port: int
    replicas: Replicas
    generation: Generation
    server: grpc.aio.Server
    http: HttpServer | None
    health: health.aio.HealthServicer

    async def stop(self, grace: float) -> None:
        """Admits no new requests and gives the running ones `grace` seconds to finish.

        Until they end, /healthz responds with 503.
        """
        self.generation.running.draining = True
        await self.health.enter_graceful_shutdown()
        stopping = [self.server.stop(grace)]
        if self.http is not None:
            stopping.append(self._stop_http(self.http, grace))
        await asyncio.gather(*stopping)
        await self.generation.released()

    async def _stop_http(self, http: HttpServer, grace: float) -> None:
        end = asyncio.get_running_loop().time() + grace
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                await self.generation.running.drained()
        await http.stop(max(0.0, end - asyncio.get_running_loop().time()))


@contextlib.asynccontextmanager
async def serve(settings: GatewaySettings) -> AsyncIterator[Gateway]:
    """A gateway that serves while entered. LatentflowError where a port, the directory or the API keys cannot be used."""
    metrics = Instruments(GATEWAY)
    keys = ApiKeys(settings.api_keys, metrics=metrics) if settings.api_keys else None
    server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS), interceptors=[KeyInterceptor(keys)] if keys else [])
    address = serving.bind(server, settings.listen, tls=settings.tls)
    metrics_port = serving.serve_metrics(metrics, settings.metrics)
    directories = _directories(settings)
    async with (
        contextlib.aclosing(directories),
        Replicas(directories=directories, token=settings.token, tls=settings.node_tls, metrics=metrics) as replicas,
    ):
        generation = Generation(settings=settings, replicas=replicas, metrics=metrics)
        http = None
        if settings.http is not None:
            api = HttpApi(generation, settings=settings, keys=keys, metrics=metrics)
            http = HttpServer(api, listen=settings.http, tls=settings.tls)
            await http.start()
        checks = health.aio.HealthServicer()
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(generation), server)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflecting.enable(server, (SERVICE, health.SERVICE_NAME))
        for service in ("", SERVICE):
            await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        metrics.of("latentflow_gateway_ready").set(1)
        gateway = Gateway(
            address=address,
            metrics_port=metrics_port,
            replicas=replicas,
            generation=generation,
            server=server,
            http=http,
            health=checks,
        )
        _log.info("serving", address=address, http=http.address if http else None, metrics_port=metrics_port)
        try:
            yield gateway
        finally:
            await gateway.stop(0)
            metrics.close()


def _directories(settings: GatewaySettings) -> AsyncGenerator[Directory, None]:
    if settings.directory is not None:
        return directory_file.follow(settings.directory)
    # The Kubernetes client takes long to import, and a gateway with a directory file does not need it.
    from latentflow_gateway import cluster

    return cluster.follow(settings.namespaces)


async def run(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    stop = serving.stop_signal()
    async with serve(settings) as gateway:
        # The garbage collector need not walk the objects of the imported modules during a request.
        gc.freeze()
        await stop.wait()
        _log.info("draining")
        await gateway.stop(settings.drain)


def main(argv: list[str] | None = None) -> None:
    """The command `latentflow-gateway`. Exits 2 with one line where it cannot serve with its settings."""
    settings = settings_module.parse(argv)
    logs.configure(process="gateway", form=settings.log_format)
    serving.run("latentflow-gateway", run(settings))


if __name__ == "__main__":
    main()

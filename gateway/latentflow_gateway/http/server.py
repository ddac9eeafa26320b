"""Serves the HTTP API in the event loop of the gateway, by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Generator

import uvicorn
from latentflow.internal import hosts, rpc, serving

from latentflow_gateway.http.app import HttpApi

# Longer than the minute for which proxies keep idle connections, so that none sends a request on one that is being closed.
_KEEP_ALIVE_SECONDS = 75
_STARTED_SECONDS = 0.01
# For the responses to requests that were ended.
_LAST_SECONDS = 5


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """The process handles its signals itself."""
        yield


class HttpServer:
    """A server of an HTTP API.

    Attributes:
        address: host:port, with the port bound.
    """

    def __init__(self, api: HttpApi, *, listen: str, tls: rpc.Tls | None) -> None:
        """FailedPreconditionError, reason PORT_TAKEN, where the address cannot be bound; port 0 takes a free one."""
        host, port = hosts.split(listen)
        bound = hosts.bindable(host)
        family = socket.AF_INET6 if ":" in bound else socket.AF_INET
        try:
            self._socket = socket.create_server(
                (bound, port), family=family, backlog=2048, dualstack_ipv6=bound == "::"
            )
        except OSError as error:
            raise serving.port_taken(listen, error.strerror or error) from None
        self.address = hosts.join(host, self._socket.getsockname()[1])
        self._api = api
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                api.asgi,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                # Its warnings are about connections that send no HTTP, such as port scans.
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                ssl_certfile=tls.certificate if tls else None,
                ssl_keyfile=tls.key if tls else None,
                ssl_ca_certs=str(tls.ca) if tls and tls.ca else None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.ca else ssl.CERT_NONE,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accepts connections from now on."""
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))
        while not self._uvicorn.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(_STARTED_SECONDS)

    async def stop(self, grace: float) -> None:
        """Accepts no new connections, gives the running requests `grace` seconds to finish, and ends the others."""
        if self._serving is None:
            self._socket.close()
            return
        self._uvicorn.config.timeout_graceful_shutdown = math.ceil(grace) + _LAST_SECONDS
        self._uvicorn.should_exit = True
        await asyncio.wait({self._serving}, timeout=grace)
        self._api.end()
        await self._serving

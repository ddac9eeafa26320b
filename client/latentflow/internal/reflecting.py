"""Server reflection, by which tools such as grpcurl and ghz find services, methods and messages without the proto files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc.aio
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection


class _Symbols:
    """The default descriptor pool, which also finds the file of a method; protobuf's own finds types and services only."""

    def __init__(self) -> None:
        self._pool: Any = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802 - the name that grpc calls
        """The file of a type, service or method by its full name. KeyError where there is none."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            if method in self._pool.FindServiceByName(service).methods_by_name:
                return self._pool.FindFileContainingSymbol(service)
            raise


def enable(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Adds the reflection service for these services and itself."""
    reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server, pool=_Symbols())

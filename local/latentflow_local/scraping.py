"""Reads the `/metrics` of the processes of this machine, which are served without TLS on the loopback interface."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import TypeVar

from latentflow.internal import hosts
from prometheus_client.parser import text_string_to_metric_families

# Of model servers and gateways.
_READY = ("latentflow_ready", "latentflow_gateway_ready")
_TIMEOUT_SECONDS = 2.0

T = TypeVar("T")


async def read(address: str, parse: Callable[[str], T]) -> T | None:
    """The parsed `/metrics` of a process; None if it does not answer.

    Args:
        address: host:port.
        parse: ValueError for text that it cannot parse.
    """

    def parsed() -> T | None:
        connection = HTTPConnection(*hosts.split(address), timeout=_TIMEOUT_SECONDS)
        try:
            connection.request("GET", "/metrics")
            return parse(connection.getresponse().read().decode())
        except (OSError, HTTPException, ValueError):
            return None
        finally:
            connection.close()

    return await asyncio.to_thread(parsed)


def is_ready(text: str) -> bool:
    """Whether a model server or a gateway accepts requests, from its `/metrics` text. ValueError for other text."""
    families = text_string_to_metric_families(text)
    return any(sample.name in _READY and sample.value == 1 for family in families for sample in family.samples)

"""Addresses of this machine to listen on."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection

from latentflow.internal import serving

# Below those that systems give to outgoing connections: one of them may take a port before the server listens that it is for.
_PORTS = range(20_000, 32_000)


def free(count: int, *, but: Collection[str] = ()) -> list[str]:
    """Addresses whose ports are free now, all different; a server that finds its own taken says so.

    Args:
        but: Addresses that are given away already, whose server may not listen yet.
    """
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            address = f"127.0.0.1:{port}"
            # Kept open until all are found, so that what another process looks for meanwhile is another.
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                if address not in but:
                    found.append(address)
    return found


def check_free(listen: str) -> str:
    """The address, its port chosen; FailedPreconditionError where it is taken, InvalidRequestError where it is none."""
    host, port = serving.host_and_port(listen)
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return f"{host}:{probe.getsockname()[1]}"
    except OSError as error:
        raise serving.port_taken(listen, error.strerror) from None

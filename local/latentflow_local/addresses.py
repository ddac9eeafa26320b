"""Free addresses of this machine for servers to listen on."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection

from latentflow.errors import FailedPreconditionError
from latentflow.internal import hosts, serving

# Below the ephemeral ports: an outgoing connection could take one of those before the server listens on it.
_PORTS = range(20_000, 32_000)


def free(count: int, *, exclude: Collection[str] = ()) -> list[str]:
    """Different addresses whose ports are free at present. A server that finds its port taken reports that itself.

    Args:
        exclude: Addresses that are already assigned, although their servers may not listen yet.
    """
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            address = f"127.0.0.1:{port}"
            # The socket stays open until all ports are found, so that another process that searches now gets other
            # ports.
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                if address not in exclude:
                    found.append(address)
    return found


def first_choice(listen: str) -> str:
    """The address if it is free; otherwise one of the same host with a free port."""
    try:
        return check_free(listen)
    except FailedPreconditionError:
        return check_free(hosts.join(hosts.split(listen)[0], 0))


def check_free(listen: str) -> str:
    """The address, with a free port in place of port 0.

    FailedPreconditionError if it is taken, InvalidRequestError if invalid.
    """
    host, port = hosts.split(listen)
    try:
        found = socket.getaddrinfo(hosts.bindable(host), port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
            return hosts.join(host, probe.getsockname()[1])
    except OSError as error:
        raise serving.port_taken(listen, error.strerror) from None

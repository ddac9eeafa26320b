"""Free addresses of this machine for servers to listen on."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Collection
from types import TracebackType

from latentflow.errors import FailedPreconditionError
from latentflow.internal import hosts, serving

# Below the ephemeral ports: an outgoing connection could take one of those before the server listens on it.
_PORTS = range(20_000, 32_000)


class Addresses:
    """The addresses of one runtime's servers, reserved from when they are chosen.

    A server listens only seconds after its address was chosen, and not while it restarts. No other runtime of this machine
    chooses the address meanwhile.
    """

    def __init__(self) -> None:
        self._reserved: dict[str, socket.socket] = {}

    def __enter__(self) -> Addresses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(())

    def of(self, listen: str) -> str:
        """The address, with a free port in place of port 0. Errors as of `check_free`."""
        checked = check_free(listen)
        host, port = hosts.split(listen)
        return checked if port else self.free(1, host=host)[0]

    def free(self, count: int, *, host: str = "127.0.0.1") -> list[str]:
        """Different addresses whose ports are free. A server that finds its port taken nevertheless reports that itself."""
        found: list[str] = []
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            address = hosts.join(host, port)
            reservation = _reserved(port)
            if reservation is None:
                continue
            if _is_free(address):
                self._reserved[address] = reservation
                found.append(address)
            else:
                reservation.close()
        return found

    def keep(self, assigned: Collection[str]) -> None:
        """Releases all addresses but these."""
        for address in self._reserved.keys() - set(assigned):
            self._reserved.pop(address).close()


def _reserved(port: int) -> socket.socket | None:
    """A socket whose name stands for the port until it is closed, also by the end of the process; None: another has it.

    Names without a file exist on Linux only; elsewhere nothing is reserved.
    """
    reservation = socket.socket(socket.AF_UNIX)
    if sys.platform == "linux":
        try:
            reservation.bind(f"\0latentflow-port-{port}")
        except OSError:
            reservation.close()
            return None
    return reservation


def _is_free(address: str) -> bool:
    try:
        check_free(address)
    except FailedPreconditionError:
        return False
    return True


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

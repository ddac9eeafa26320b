"""Addresses of servers as text, host:port, where an IPv6 host stands in brackets as in a URL."""

from __future__ import annotations

import ipaddress
import socket

from latentflow.errors import InvalidRequestError

# Of loopback addresses; ip6-... are the names in Debian's /etc/hosts.
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")


def split(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port. InvalidRequestError where the text has another form."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]") if host.startswith("[") == host.endswith("]") else ""
    if not bare or not port.isdecimal() or int(port) > 65_535 or (":" in bare and not _is_ip(bare)):
        raise InvalidRequestError(
            f"{address!r} is not an address; write host:port, such as 127.0.0.1:8400 or [::1]:8400."
        )
    return bare, int(port)


def join(host: str, port: int | str) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether connections to a host stay on this machine."""
    if not _is_ip(host):
        name = host.lower().removesuffix(".")
        return name in _LOOPBACK_NAMES or name.endswith(".localhost")
    address = ipaddress.ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    # A connection to the address that means all addresses reaches this machine.
    return address.is_loopback or address.is_unspecified


def bindable(host: str) -> str:
    """The host to bind a socket to: :: means all addresses, those of IPv4 too, also where the machine lacks IPv6."""
    return "0.0.0.0" if host == "::" and not socket.has_dualstack_ipv6() else host


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

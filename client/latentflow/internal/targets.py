"""gRPC targets: whether a target is on this machine, and whether a connection to it uses an HTTP proxy.

A target is host:port, or a URI of one of gRPC's name resolvers, such as dns:///host:port, ipv4:address:port, unix:path.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.parse

from latentflow.errors import InvalidRequestError
from latentflow.internal import hosts

_SOCKET_SCHEMES = ("unix", "unix-abstract", "vsock")
# The first that is set counts, even if it is empty.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXEMPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")


def check(target: str) -> str:
    """The target. InvalidRequestError for the URL of an HTTP API, which gRPC would resolve as a name of a host."""
    if target.lower().startswith(("http://", "https://")):
        raise InvalidRequestError(
            f"The target {target} is a URL of the HTTP API. Pass the address of gRPC as host:port, whose port is 8400 by default."
        )
    return target


def is_local(target: str) -> bool:
    """Whether connections to a target stay on this machine."""
    return all(hosts.is_loopback(host) for host in _hosts(target))


def proxy_variable(target: str) -> str | None:
    """The environment variable that names the HTTP proxy for a target; None for a direct connection.

    The rules are gRPC's, except that a target on this machine never uses a proxy.
    """
    variable = _first_set(_PROXY_VARIABLES)
    # gRPC ignores proxies of other schemes.
    if variable is None or not os.environ[variable].lower().startswith("http://"):
        return None
    return None if is_local(target) or all(_is_exempt(host) for host in _hosts(target)) else variable


def exemption_variable() -> str:
    """The environment variable that lists the hosts without a proxy."""
    return _first_set(_EXEMPTION_VARIABLES) or "no_proxy"


def _is_exempt(host: str) -> bool:
    """Whether the environment excludes a host from the proxy, by the end of its name or by its network."""
    listed = os.environ.get(exemption_variable(), "").lower().split(",")
    entries = [entry for one in listed if (entry := one.strip())]
    return any(host.lower().endswith(entry) or _is_in(host, entry) for entry in entries)


def _first_set(variables: tuple[str, ...]) -> str | None:
    return next((variable for variable in variables if variable in os.environ), None)


def _is_in(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _hosts(target: str) -> list[str]:
    scheme, _, rest = target.partition(":")
    scheme, rest = scheme.lower(), urllib.parse.unquote(rest)
    if scheme in _SOCKET_SCHEMES:
        return []
    if scheme == "dns":
        return [_host(rest.rpartition("/")[2])]
    if scheme in ("ipv4", "ipv6"):
        return [_host(address) for address in rest.lstrip("/").split(",")]
    return [_host(target)]


def _host(address: str) -> str:
    """The host of an address whose port may be absent."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]

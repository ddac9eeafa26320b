"""Addresses as text: host:port, with brackets around IPv6."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.errors import InvalidRequestError
from latentflow.internal import hosts


@given(host=st.ip_addresses().map(str), port=st.integers(0, 65_535))
def test_an_address_is_split_into_what_it_was_joined_from(host: str, port: int) -> None:
    assert hosts.split(hosts.join(host, port)) == (host, port)


def test_a_pod_s_ipv6_address_is_understood_without_brackets() -> None:
    assert hosts.split("fd00:10:244::5:8500") == ("fd00:10:244::5", 8500)
    assert hosts.join(*hosts.split("fd00:10:244::5:8500")) == "[fd00:10:244::5]:8500"


@pytest.mark.parametrize("text", ["", "8400", ":8400", "host", "host:", "host:http", "host:70000", "::1", "[::1:8400"])
def test_a_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not an address"):
        hosts.split(text)


@pytest.mark.parametrize(
    ("host", "stays"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", True),
        ("::", True),
        ("LOCALHOST", True),
        ("localhost.", True),
        ("gateway.localhost", True),
        ("ip6-localhost", True),
        ("::ffff:127.0.0.1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("::ffff:10.0.0.1", False),
        ("notlocalhost", False),
        ("localhost.example", False),
        ("10.0.0.1", False),
        ("gateway.svc", False),
        ("fd00::1", False),
    ],
)
def test_loopback_hosts_are_those_of_this_machine(host: str, stays: bool) -> None:
    assert hosts.is_loopback(host) is stays


def test_a_socket_bound_to_all_addresses_accepts_ipv4() -> None:
    found = socket.getaddrinfo(hosts.bindable("::"), 0, type=socket.SOCK_STREAM)[0]
    dualstack = found[0] == socket.AF_INET6
    with (
        socket.create_server(found[4][:2], family=found[0], dualstack_ipv6=dualstack) as server,
        socket.create_connection(("127.0.0.1", server.getsockname()[1]), timeout=5) as client,
    ):
        assert ipaddress.ip_address(client.getpeername()[0]).is_loopback

"""Targets and the HTTP proxy of the environment, with a real proxy: the client uses it as gRPC does, never on this machine."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator

import grpc
import pytest
from latentflow import NO_RETRIES, AsyncClient, Client
from latentflow.errors import InvalidRequestError, UnavailableError
from latentflow.internal import targets
from latentflow.v1 import generation_pb2, generation_pb2_grpc

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.mark.parametrize("target", ["http://127.0.0.1:8402/v1", "https://gateway.example"])
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_a_url_of_the_http_api_is_refused_as_a_target(client: type[Client] | type[AsyncClient], target: str) -> None:
    with pytest.raises(InvalidRequestError, match="Pass the address of gRPC as host:port"):
        client(target)


class Proxy(socketserver.ThreadingTCPServer):
    """Refuses each request, and records the hosts of the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hosts: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        self.server.hosts.append(self.rfile.readline().decode().split()[1])
        self.wfile.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


LOCAL = [
    "127.0.0.1:1",
    "127.0.0.1",
    "LOCALHOST:1",
    "localhost.:1",
    "a.localhost:1",
    "ip6-localhost:1",
    "[::1]:1",
    "[::ffff:127.0.0.1]:1",
    "::ffff:127.0.0.1",
    "dns:localhost:1",
    "dns:///localhost:1",
    "DNS:///localhost:1",
    "dns:///%6cocalhost:1",
    "ipv4:127.0.0.1:1",
    "ipv4:127.0.0.1:1,127.0.0.1:2",
    "ipv6:[::1]:1",
    "ipv6:%5B::1%5D:1",
    "unix:/nonexistent/socket",
    "unix:///nonexistent/socket",
    "unix-abstract:nonexistent",
]


@pytest.mark.parametrize("target", LOCAL)
def test_a_target_on_this_machine_never_uses_a_proxy(
    target: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    assert targets.is_local(target)
    with Client(target, retries=NO_RETRIES) as client, pytest.raises(UnavailableError) as caught:
        client.workflows(timeout=10)
    assert "proxy" not in caught.value.message
    assert not caught.value.retryable
    assert proxy.hosts == []


async def test_the_asynchronous_client_uses_no_proxy_on_this_machine(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    async with AsyncClient("dns:///localhost:1", retries=NO_RETRIES) as client:
        with pytest.raises(UnavailableError):
            await client.workflows(timeout=10)
    assert proxy.hosts == []


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("gateway.invalid:1", "gateway.invalid:1"),
        ("dns:///gateway.invalid:1", "gateway.invalid:1"),
        ("ipv4:192.0.2.1:1", "192.0.2.1:1"),
        ("[2001:db8::1]:1", "[2001:db8::1]:1"),
        # Port 443 of another machine, although the text begins with a loopback address.
        ("::1:8400", "[::1:8400]:443"),
    ],
)
def test_a_failed_call_names_the_proxy_that_it_used(
    target: str, host: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    with Client(target, retries=NO_RETRIES) as client, pytest.raises(UnavailableError) as caught:
        client.workflows(timeout=10)
    assert "gRPC uses the HTTP proxy of http_proxy; add the gateway to no_proxy." in caught.value.message
    assert caught.value.retryable
    assert set(proxy.hosts) == {host}


# The variable of the proxy that applies to gateway.invalid, or None.
ENVIRONMENTS: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"http_proxy": "PROXY", "https_proxy": "PROXY"}, "https_proxy"),
    ({"http_proxy": "PROXY", "grpc_proxy": ""}, None),
    ({"http_proxy": "PROXY", "https_proxy": "https://127.0.0.1:1"}, None),
    ({"http_proxy": "127.0.0.1:1"}, None),
    ({"http_proxy": "PROXY", "no_proxy": "other.invalid, "}, "http_proxy"),
    ({"http_proxy": "PROXY", "no_proxy": "*"}, "http_proxy"),
    ({"http_proxy": "PROXY", "no_proxy": "other.invalid, .INVALID"}, None),
    ({"http_proxy": "PROXY", "no_proxy": "gateway.invalid", "no_grpc_proxy": ""}, "http_proxy"),
    ({"http_proxy": "PROXY", "no_proxy": "", "no_grpc_proxy": "gateway.invalid"}, None),
]


@pytest.mark.parametrize(("environment", "variable"), ENVIRONMENTS)
def test_the_environment_selects_the_proxy_by_the_rules_of_grpc(
    environment: dict[str, str], variable: str | None, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(name, text.replace("PROXY", proxy.url))
    assert targets.proxy_variable("gateway.invalid:1") == variable
    with grpc.insecure_channel("gateway.invalid:1") as channel, pytest.raises(grpc.RpcError):
        generation_pb2_grpc.GenerationStub(channel).ListWorkflows(generation_pb2.ListWorkflowsRequest(), timeout=10)
    assert bool(proxy.hosts) == (variable is not None)


@pytest.mark.parametrize(
    ("target", "exempt", "variable"),
    [
        ("10.1.2.3:1", "10.0.0.0/8", None),
        ("10.1.2.3:1", "10.2.0.0/16", "http_proxy"),
        ("ipv4:10.1.2.3:1", "10.1.2.3", None),
        ("ipv4:10.1.2.3:1,10.1.2.4:1", "10.1.2.3", "http_proxy"),
        ("ipv4:10.1.2.3:1,10.1.2.4:1", "10.1.2.0/24", None),
        ("[2001:db8::1]:1", "2001:db8::/32", None),
        ("[2001:db8::1]:1", "10.0.0.0/8", "http_proxy"),
    ],
)
def test_an_exempt_network_excludes_its_addresses_from_the_proxy(
    target: str, exempt: str, variable: str | None, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", exempt)
    assert targets.proxy_variable(target) == variable


def test_the_remedy_names_the_variable_of_exemptions_that_applies(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_grpc_proxy", "other.invalid")
    raises = pytest.raises(UnavailableError, match="add the gateway to no_grpc_proxy")
    with Client("gateway.invalid:1", retries=NO_RETRIES) as client, raises:
        client.workflows(timeout=10)

"""What a client reports whose TLS does not fit that of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
from latentflow import AsyncClient, Client, Retries
from latentflow.errors import UnavailableError
from latentflow.internal.rpc import Tls
from latentflow_gateway.server import Gateway
from support.serving import without_servers

NOT_VALID = "The certificate of the gateway is not valid for this client. Pass the CA that has signed it, as Client"
MUTUAL = "mutual"
HTTP = "That port speaks HTTP/1.1; pass the address of gRPC"


def written(folder: Path, *, host: str) -> Tls:
    """The files of a server with a certificate for a host, and the CA that has signed it."""
    authority = trustme.CA()
    certificate = authority.issue_cert(host)
    folder.mkdir()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return Tls(ca=folder / "ca.pem", certificate=folder / "cert.pem", key=folder / "key.pem")


def http(gateway: Gateway) -> str:
    assert gateway.http is not None
    return gateway.http.address


def grpc(gateway: Gateway) -> str:
    return gateway.address


@pytest.mark.parametrize(
    ("host", "ca", "address", "words"),
    [
        ("127.0.0.1", None, grpc, "closed the connection at once, as a gateway with TLS does: pass its CA"),
        ("127.0.0.1", "other", grpc, NOT_VALID),
        ("castle.example", "own", grpc, NOT_VALID),
        ("127.0.0.1", "own", http, HTTP),
        (MUTUAL, "own", grpc, "as a gateway that requires client certificates does: pass yours"),
        (None, "own", grpc, "That port serves without TLS; leave out Client(tls=…) and --tls-ca"),
    ],
)
async def test_a_client_whose_tls_does_not_fit_reports_what_to_change(
    tmp_path: Path, host: str | None, ca: str | None, address: Callable[[Gateway], str], words: str
) -> None:
    """Host: that of the certificate, MUTUAL for a gateway that requires client certificates, None for one without TLS."""
    name = "127.0.0.1" if host in (None, MUTUAL) else str(host)
    files = {folder: written(tmp_path / folder, host=name) for folder in ("own", "other")}
    server = replace(files["own"], ca=files["own"].ca if host == MUTUAL else None) if host else None
    tls = Tls(ca=files[ca].ca) if ca else None
    once = Retries(attempts=1)
    async with without_servers(tmp_path, tls=server) as gateway:
        target = address(gateway)

        def listed() -> None:
            with Client(target, tls=tls, retries=once, timeout=20) as client:
                client.workflows()

        with pytest.raises(UnavailableError) as of_blocking:
            await asyncio.to_thread(listed)
        async with AsyncClient(target, tls=tls, retries=once, timeout=20) as client:
            with pytest.raises(UnavailableError) as of_async:
                await client.workflows()
    for caught in (of_blocking, of_async):
        assert f"No gateway responds at {target}" in caught.value.message
        assert words in caught.value.message

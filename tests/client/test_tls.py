"""TLS files that cannot be used are named, by clients and servers alike."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme
from latentflow import Client
from latentflow.errors import FailedPreconditionError
from latentflow.internal import rpc, serving
from latentflow.internal.rpc import Tls
from structlog.testing import capture_logs


@pytest.fixture
def files(tmp_path: Path) -> Tls:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    return Tls(ca=tmp_path / "ca.pem", certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")


def other_key(path: Path) -> None:
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(path)


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("ca.pem", Path.unlink, "ca.pem cannot be read for TLS: No such file or directory."),
        ("cert.pem", Path.unlink, "cert.pem cannot be read for TLS: No such file or directory."),
        ("ca.pem", lambda path: path.write_text("x"), "ca.pem cannot be used for TLS: "),
        ("cert.pem", lambda path: path.write_text("x"), "cannot be used for TLS: "),
        ("key.pem", other_key, "key.pem cannot be used for TLS: KEY_VALUES_MISMATCH. TLS takes PEM files"),
    ],
)
def test_a_file_that_cannot_be_used_for_tls_is_named(
    files: Tls, tmp_path: Path, name: str, how: Callable[[Path], object], words: str
) -> None:
    how(tmp_path / name)
    with pytest.raises(FailedPreconditionError) as of_server:
        files.server_credentials()
    with pytest.raises(FailedPreconditionError) as of_client:
        Client("127.0.0.1:1", tls=files)
    for caught in (of_server, of_client):
        assert str(tmp_path / name) in caught.value.message
        assert words in caught.value.message


def test_the_hosts_of_a_certificate_are_those_that_clients_may_use(tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("*.castle.example", "castle.example", "127.0.0.1", "::1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    tls = Tls(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    assert [name.lower() for name in tls.names()] == ["castle.example", "127.0.0.1", "0:0:0:0:0:0:0:1"]
    assert dated(tmp_path, begins=-2, ends=-1).names() == []


async def test_a_server_with_a_broken_certificate_does_not_report_a_taken_port(files: Tls, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("x")
    server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
    with pytest.raises(FailedPreconditionError, match="cannot be used for TLS"):
        serving.bind(server, "127.0.0.1:0", tls=files)


def dated(folder: Path, *, begins: int, ends: int) -> Tls:
    """The files of a server whose certificate is valid between two days, counted from today."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    certificate = trustme.CA().issue_cert("127.0.0.1", not_before=now + begins * day, not_after=now + ends * day)
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return Tls(certificate=folder / "cert.pem", key=folder / "key.pem")


@pytest.mark.parametrize(
    ("begins", "ends", "problem"),
    [(-2, 2, None), (-2, -1, "certificate has expired"), (1, 2, "certificate is not yet valid")],
)
async def test_a_server_warns_of_a_certificate_that_its_dates_make_invalid(
    tmp_path: Path, begins: int, ends: int, problem: str | None
) -> None:
    server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
    with capture_logs() as logs:
        serving.bind(server, "127.0.0.1:0", tls=dated(tmp_path, begins=begins, ends=ends))
    found = [(one["certificate"], one["problem"]) for one in logs if one["log_level"] == "warning"]
    assert found == ([(str(tmp_path / "cert.pem"), problem)] if problem else [])

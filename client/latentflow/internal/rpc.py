"""Options, credentials, metadata and trace context of every gRPC channel and call of the project."""

from __future__ import annotations

import contextlib
import re
import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from latentflow.errors import FailedPreconditionError

PROTOCOL_VERSION = 1
# Bytes of tensor data in one message; larger tensors travel as several chunks.
CHUNK_BYTES = 1 << 20
# Room for a request with several control images. Tensors are sent in chunks far below it.
MAX_MESSAGE_BYTES = 64 << 20

AUTHORIZATION = "authorization"
TRACEPARENT = "traceparent"
REQUEST_ID = "x-request-id"

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer whose host is lost is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect quickly to a server that has restarted.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
SERVER_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Without it, a second server could bind the same port and take half of the connections.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A W3C trace context: 16-byte trace id and 8-byte span id as lower-case hex, and the flags."""

    trace_id: str
    span_id: str
    flags: str = "01"

    @classmethod
    def new(cls) -> Trace:
        return cls(trace_id=secrets.token_hex(16), span_id=secrets.token_hex(8))

    @classmethod
    def parse(cls, header: str | None) -> Trace | None:
        """The context of a `traceparent` header; None where it is absent or malformed, as the standard requires."""
        match = _TRACEPARENT.fullmatch(header or "")
        if match is None or set(match[1]) == {"0"} or set(match[2]) == {"0"}:
            return None
        return cls(trace_id=match[1], span_id=match[2], flags=match[3])

    def child(self) -> Trace:
        """The same trace, a new span."""
        return Trace(trace_id=self.trace_id, span_id=secrets.token_hex(8), flags=self.flags)

    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files for one side of a TLS connection.

    Attributes:
        ca: CA certificates by which to verify the other side; None: the system's, and for a server no verification.
        certificate, key: Of this side; a client needs them where the server requires client certificates.
        name: The name in the server's certificate, where it is not the one in the address: behind a forwarded port.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """FailedPreconditionError for a file that cannot be used."""
        self.check()
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca), private_key=_read(self.key), certificate_chain=_read(self.certificate)
        )

    def channel_options(self) -> list[tuple[str, int | str]]:
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []

    def server_credentials(self) -> grpc.ServerCredentials:
        """Requires client certificates where `ca` is set. ValueError without key and certificate.

        FailedPreconditionError for a file that cannot be used.
        """
        self.check()
        key, certificate, ca = _read(self.key), _read(self.certificate), _read(self.ca)
        if key is None or certificate is None:
            raise ValueError("A TLS server needs both a certificate and a key.")
        return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=ca is not None)

    def check(self) -> None:
        """FailedPreconditionError for a file that cannot be used.

        gRPC reports it as an address that it cannot bind, or as a failed handshake.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        files = [path for path in (self.ca, self.certificate, self.key) if path is not None]
        try:
            for path in files:
                path.read_bytes()
            if self.ca is not None:
                files = [self.ca]
                context.load_verify_locations(self.ca)
            if self.certificate is not None and self.key is not None:
                files = [self.certificate, self.key]
                # Without a password, OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            names = " and ".join(str(path) for path in files)
            raise FailedPreconditionError(
                f"{names} cannot be used for TLS: {error.reason or error}. TLS takes PEM files, and a key without a password "
                "that belongs to its certificate."
            ) from None
        except OSError as error:
            raise FailedPreconditionError(f"{error.filename} cannot be read for TLS: {error.strerror}.") from None

    def refusal(self) -> str | None:
        """Why every client refuses the certificate of this server, such as its expiry; None if its CA decides.

        ValueError without key and certificate. FailedPreconditionError for a file that cannot be used.
        """
        try:
            self._shown()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        return None

    def names(self) -> list[str]:
        """The hosts in the certificate of this server, without those with `*`; none where `refusal` has a reason.

        The errors are those of `refusal`.
        """
        try:
            shown = self._shown()
        except ssl.SSLCertVerificationError:
            return []
        hosts = [str(name) for kind, name in shown.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
        return [name for name in hosts if "*" not in name]

    def _shown(self) -> Mapping[str, Any]:
        """The certificate as a client gets it, which checks its dates alone. ssl.SSLCertVerificationError where it refuses them."""
        self.check()
        if self.key is None or self.certificate is None:
            raise ValueError("A TLS server needs both a certificate and a key.")
        of_server, of_client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        of_server.load_cert_chain(self.certificate, self.key)
        # This client trusts the certificate itself, for any name, so that only its dates can be wrong.
        of_client.check_hostname = False
        of_client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        of_client.load_verify_locations(self.certificate)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = of_server.wrap_bio(to_server, to_client, server_side=True)
        client = of_client.wrap_bio(to_client, to_server)
        for side in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        return client.getpeercert() or {}


def channel_options(*, tls: Tls | None, proxied: bool) -> list[tuple[str, int | str]]:
    """Options of a channel.

    Args:
        proxied: Whether the channel may use the HTTP proxy that the environment names.
    """
    options = [*CHANNEL_OPTIONS, *(tls.channel_options() if tls is not None else ())]
    return options if proxied else [*options, ("grpc.enable_http_proxy", 0)]


def channel(address: str, *, tls: Tls | None, proxied: bool = False) -> grpc.aio.Channel:
    """A channel for asyncio. Between servers it uses no HTTP proxy."""
    options = channel_options(tls=tls, proxied=proxied)
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options)


def metadata(*, token: str | None, trace: Trace | None, request_id: str | None) -> list[tuple[str, str]]:
    """Call metadata: bearer token, trace context and request id, each where it is not None."""
    pairs = []
    if token:
        pairs.append((AUTHORIZATION, f"Bearer {token}"))
    if trace is not None:
        pairs.append((TRACEPARENT, trace.header()))
    if request_id:
        pairs.append((REQUEST_ID, request_id))
    return pairs


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()

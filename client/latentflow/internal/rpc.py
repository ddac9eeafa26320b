"""What every gRPC channel and call of the project shares: options, credentials, metadata, trace context.

The client, the gateway and the model servers build their channels and metadata here, so that limits, keepalive and the
names of headers are written once.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import grpc

PROTOCOL_VERSION = 1
# Bytes of tensor data in one message; larger tensors travel as several chunks.
CHUNK_BYTES = 1 << 20
# Messages stay below it: a chunk, or a request with a few control images, or a PNG.
MAX_MESSAGE_BYTES = 64 << 20

AUTHORIZATION = "authorization"
TRACEPARENT = "traceparent"
REQUEST_ID = "x-request-id"

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a word is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server is found again quickly.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
SERVER_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers never share a port by accident: the second says that it is taken.
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
        """The context of a `traceparent` header; None where it is absent or malformed, as the standard asks."""
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
    """Files of one side of a TLS connection, in PEM. `certificate` and `key` together make it mutual for a client.

    Attributes:
        name: Whose certificate a client expects, where that is not the name it dials: behind a port that is forwarded.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca), private_key=_read(self.key), certificate_chain=_read(self.certificate)
        )

    def channel_options(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []

    def server_credentials(self) -> grpc.ServerCredentials:
        """Asks clients for a certificate where a CA is given. ValueError without key and certificate."""
        key, certificate, ca = _read(self.key), _read(self.certificate), _read(self.ca)
        if key is None or certificate is None:
            raise ValueError("A TLS server needs both a certificate and a key; give the two files.")
        return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=ca is not None)


def channel(address: str, *, tls: Tls | None) -> grpc.aio.Channel:
    """A channel for asyncio, to a server or between servers."""
    options = list(CHANNEL_OPTIONS)
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), [*options, *tls.channel_options()])


def metadata(*, token: str | None, trace: Trace | None, request_id: str | None) -> list[tuple[str, str]]:
    """Call metadata: bearer token, trace context, request id; what is None is left out."""
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

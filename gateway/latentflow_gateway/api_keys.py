"""Authentication of clients by API keys, which are the files of a folder: one for each client.

A Kubernetes Secret mounted as a folder has this form: the file's name is the client's, its content is the key. The folder
is checked at every call, so that a key is refused as soon as its file is removed. The gateway keeps only digests of the
keys; logs and metrics carry the client's name.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NewType

import grpc.aio
import structlog
from latentflow.errors import AuthenticationError, FailedPreconditionError
from latentflow.internal import rpc
from latentflow.internal.calls import refusing
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason

_log = structlog.get_logger()
# Kubelets check the gateway's health, and tools list its services, without a key.
_WITHOUT_KEY = ("/grpc.health.v1.", "/grpc.reflection.")
_caller: ContextVar[str] = ContextVar("caller", default="")

Digest = NewType("Digest", bytes)
# Name, modification time, inode and size of every file.
_Stamp = tuple[tuple[str, int, int, int], ...]


def digests(files: Iterable[tuple[str, bytes]]) -> dict[str, Digest]:
    """Digests of the keys by client, from the names and contents of files. Empty files are left out. Pure.

    White space around a key is not part of it: editors and `echo` end a file with a newline.
    """
    return {name: _digest(key) for name, content in files if (key := content.strip())}


def client_of(authorization: str, known: Mapping[str, Digest]) -> str | None:
    """The client whose key an authorization header carries; None where the key is unknown. Pure.

    The time it takes does not depend on the key that was sent, nor on which client it belongs to.

    Args:
        authorization: "Bearer KEY".
    """
    scheme, _, key = authorization.partition(" ")
    sent = _digest(key.strip().encode())
    found = None
    for name, digest in known.items():
        if hmac.compare_digest(sent, digest):
            found = name
    return found if scheme.lower() == "bearer" else None


def caller() -> str:
    """The client whose call this task serves; empty where the gateway requires no key."""
    return _caller.get()


class ApiKeys:
    """The current keys of a folder."""

    def __init__(self, folder: Path) -> None:
        """FailedPreconditionError where the folder cannot be read."""
        self._folder = folder
        try:
            self._seen: _Stamp | None = _stamp(folder)
            self._known = _read(folder)
        except OSError as error:
            raise FailedPreconditionError(
                f"The API keys cannot be read from {folder}: {error.strerror}. Pass a folder with one file for each client."
            ) from None
        _log.info("API keys read", clients=sorted(self._known))

    def client(self, authorization: str) -> str | None:
        """The client whose key an authorization header carries; None where the key is unknown.

        While the folder cannot be read, the keys that were read last stay valid.
        """
        self._refresh()
        return client_of(authorization, self._known)

    def _refresh(self) -> None:
        try:
            stamp = _stamp(self._folder)
            if stamp == self._seen:
                return
            self._known = _read(self._folder)
            _log.info("API keys changed", clients=sorted(self._known))
        except OSError as error:
            if self._seen is not None:
                _log.warning("API keys cannot be read; the last ones stay valid", problem=error.strerror)
            stamp = None
        self._seen = stamp


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid key, and binds the client's name to the log context of the others."""

    def __init__(self, keys: ApiKeys, *, metrics: Instruments) -> None:
        self._keys = keys
        self._metrics = metrics
        self._missing = refusing(
            AuthenticationError(
                "This gateway requires an API key: pass Client(api_key=…) or --api-key, or set LATENTFLOW_API_KEY.",
                reason=Reason.API_KEY_MISSING,
            )
        )
        self._wrong = refusing(
            AuthenticationError(
                "This gateway does not accept the API key; it may have been replaced. Ask for the current one.",
                reason=Reason.API_KEY_UNKNOWN,
            )
        )

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        if details.method.startswith(_WITHOUT_KEY):
            return await continuation(details)
        sent = str(dict(details.invocation_metadata).get(rpc.AUTHORIZATION, ""))
        client = self._keys.client(sent)
        self._metrics.of("latentflow_gateway_authentications_total", client=client or "?").inc()
        if client is None:
            return self._wrong if sent else self._missing
        _caller.set(client)
        structlog.contextvars.bind_contextvars(client=client)
        return await continuation(details)


def _digest(key: bytes) -> Digest:
    return Digest(hashlib.sha256(key).digest())


def _files(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        # The kubelet and editors keep entries of their own whose names begin with a dot.
        found = [entry for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return sorted(found, key=lambda entry: entry.name)


def _read(folder: Path) -> dict[str, Digest]:
    return digests((entry.name, Path(entry.path).read_bytes()) for entry in _files(folder))


def _stamp(folder: Path) -> _Stamp:
    found = ((entry.name, entry.stat()) for entry in _files(folder))
    return tuple((name, stat.st_mtime_ns, stat.st_ino, stat.st_size) for name, stat in found)

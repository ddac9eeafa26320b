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
    """Digests of the keys by client, from the names and contents of files. Pure.

    White space around a key is not part of it: editors and `echo` end a file with a newline. Files without a key that a
    client can send are left out.
    """
    return {name: _digest(content.strip()) for name, content in files if problem(content) is None}


def problem(content: bytes) -> str | None:
    """Why no client can send the key that a file contains; None where one can. Pure."""
    key = content.strip()
    if not key:
        return "it is empty"
    if not (key.isascii() and key.decode("ascii").isprintable()):
        return "its key has characters other than printable ASCII, or several lines"
    return None


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

    def __init__(self, folder: Path, *, metrics: Instruments) -> None:
        """FailedPreconditionError where the folder cannot be read."""
        self._folder = folder
        self._metrics = metrics
        try:
            self._seen: _Stamp | None = _stamp(folder)
            self._known = _read(folder)
        except OSError as error:
            raise FailedPreconditionError(
                f"The API keys cannot be read from {folder}: {error.strerror}. Pass a folder with one file for each client."
            ) from None
        _log.info("API keys read", clients=sorted(self._known))
        if not self._known:
            _log.warning("the folder of API keys holds no key: every call is refused", folder=str(folder))

    def admit(self, authorization: str) -> None:
        """Binds the client whose key an authorization header carries to this task and its log context.

        AuthenticationError where the key is unknown. While the folder cannot be read, the keys that were read last stay
        valid.
        """
        self._refresh()
        client = client_of(authorization, self._known)
        self._metrics.of("latentflow_gateway_authentications_total", client=client or "?").inc()
        if client is None:
            raise _refusal(authorization)
        _caller.set(client)
        structlog.contextvars.bind_contextvars(client=client)

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
    """Refuses gRPC calls without a valid key."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        if not details.method.startswith(_WITHOUT_KEY):
            try:
                self._keys.admit(str(dict(details.invocation_metadata).get(rpc.AUTHORIZATION, "")))
            except AuthenticationError as error:
                return refusing(error)
        return await continuation(details)


def _refusal(authorization: str) -> AuthenticationError:
    """Why an authorization header is not accepted; its content is not part of the message."""
    if authorization and authorization.partition(" ")[0].lower() != "bearer":
        return AuthenticationError(
            "The authorization header does not begin with `Bearer` and a space. Send `Authorization: Bearer KEY`.",
            reason=Reason.API_KEY_MISSING,
        )
    return _unknown() if authorization else _missing()


def _missing() -> AuthenticationError:
    return AuthenticationError(
        "This gateway requires an API key: pass Client(api_key=…) or --api-key, set LATENTFLOW_API_KEY, or send the HTTP "
        "header `Authorization: Bearer KEY`.",
        reason=Reason.API_KEY_MISSING,
    )


def _unknown() -> AuthenticationError:
    return AuthenticationError(
        "This gateway does not accept the API key; it may have been replaced. Ask for the current one.",
        reason=Reason.API_KEY_UNKNOWN,
    )


def _digest(key: bytes) -> Digest:
    return Digest(hashlib.sha256(key).digest())


def _files(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        # The kubelet and editors keep entries of their own whose names begin with a dot.
        found = [entry for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return sorted(found, key=lambda entry: entry.name)


def _read(folder: Path) -> dict[str, Digest]:
    """The digests of a folder's keys. Logs the files that it leaves out."""
    files = [(entry.name, Path(entry.path).read_bytes()) for entry in _files(folder)]
    for name, content in files:
        if (reason := problem(content)) is not None:
            _log.warning("a file is not used as an API key", file=name, problem=reason)
    return digests(files)


def _stamp(folder: Path) -> _Stamp:
    found = ((entry.name, entry.stat()) for entry in _files(folder))
    return tuple((name, stat.st_mtime_ns, stat.st_ino, stat.st_size) for name, stat in found)

"""Idempotent requests: one that is sent again with its idempotency key gets the events of the first, and runs once.

Idempotency keys belong to a client: the same key of two clients, told apart by their API keys, is two keys.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from cachetools import TTLCache
from latentflow.errors import CancelledError, ConflictError
from latentflow.v1 import generation_pb2

# The events of finished requests are kept for so long, and within so many bytes in all.
_KEPT_SECONDS = 120.0
_KEPT_BYTES = 64 << 20
# A client and its idempotency key.
_Key = tuple[str, str]


class Broadcast:
    """The events of one request, kept from the first on, for any number of listeners.

    The work that emits them is cancelled when the last listener leaves before its end.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.size = 0
        self._events: list[generation_pb2.GenerateResponse] = []
        self._ended = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._listeners = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def succeeded(self) -> bool:
        return self._ended and self._error is None

    def start(self, work: Callable[[], Awaitable[None]], finished: Callable[[], None]) -> None:
        """Runs the work that emits the events; `finished` is called when it has ended, with or without an error."""

        async def run() -> None:
            try:
                await work()
            except asyncio.CancelledError:
                self._error = CancelledError("Every caller of this request has left.")
                raise
            except BaseException as error:
                self._error = error
            finally:
                self._ended = True
                self._wake()
                finished()

        self._task = asyncio.create_task(run())

    def emit(self, event: generation_pb2.GenerateResponse) -> None:
        self._events.append(event)
        self.size += event.ByteSize()
        self._wake()

    async def listen(self) -> AsyncGenerator[generation_pb2.GenerateResponse, None]:
        """All events from the first on. Raises what the work raised. The last listener to leave early cancels the work."""
        self._listeners += 1
        try:
            sent = 0
            while True:
                changed = self._changed
                while sent < len(self._events):
                    sent += 1
                    yield self._events[sent - 1]
                if self._ended:
                    break
                if changed is self._changed:
                    await changed.wait()
            if self._error is not None:
                raise self._error
        finally:
            self._listeners -= 1
            if not self._listeners and not self._ended and self._task is not None:
                self._task.cancel()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class IdempotentRequests:
    """Requests by idempotency key: those that run and, for a limited time, those that have succeeded."""

    def __init__(self) -> None:
        self._running: dict[_Key, Broadcast] = {}
        self._kept: TTLCache[_Key, Broadcast] = TTLCache(_KEPT_BYTES, _KEPT_SECONDS, getsizeof=lambda b: b.size)

    def submit(
        self,
        request: generation_pb2.GenerateRequest,
        work: Callable[[Broadcast], Awaitable[None]],
        *,
        client: str = "",
    ) -> Broadcast:
        """The request's events: those of the earlier request with its key, or of `work`, which starts now.

        ConflictError where the earlier request has other arguments.

        Args:
            client: The client's name; empty where the gateway requires no API keys.
        """
        key = (client, request.idempotency_key) if request.idempotency_key else None
        fingerprint = _fingerprint(request)
        known = (self._running.get(key) or self._kept.get(key)) if key else None
        if known is not None:
            if known.fingerprint != fingerprint:
                raise ConflictError(
                    f"The idempotency key {request.idempotency_key!r} belongs to another request; use a new key for a "
                    "new request."
                )
            return known
        broadcast = Broadcast(fingerprint)
        if key:
            self._running[key] = broadcast
        broadcast.start(lambda: work(broadcast), lambda: self._finished(key, broadcast))
        return broadcast

    def _finished(self, key: _Key | None, broadcast: Broadcast) -> None:
        if key is None:
            return
        if self._running.get(key) is broadcast:
            del self._running[key]
        # A failed request runs again when it is sent again, so only those that succeeded are kept.
        if broadcast.succeeded and broadcast.size <= _KEPT_BYTES:
            self._kept[key] = broadcast


def _fingerprint(request: generation_pb2.GenerateRequest) -> str:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()

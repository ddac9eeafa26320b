"""Tensors that this server holds for other servers, each under a lease.

Roles `put` their results and send the messages; the Tensors servicer reads, renews and releases what is held. `sweep`
frees tensors whose lease has expired, so that a dead consumer leaks nothing. Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from google.protobuf import duration_pb2
from latentflow.errors import OwnerLostError
from latentflow.internal.metrics import Instruments
from latentflow.v1 import tensors_pb2

from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.transfer import Sender, Transport

# A tensor of this size crosses the gateway faster than a Fetch begins.
INLINE_BYTES = 8 << 10


@dataclass(slots=True)
class Held:
    """A tensor, the request that it was made for, and its sender."""

    request_id: str
    tensor: torch.Tensor
    expires: float
    sender: Sender


class TensorStore:
    """The tensors of one server.

    Args:
        address: host:port that peers fetch from.
        lease: Seconds a handle lives unless renewed.
        clock: Monotonic seconds.
        transport: Makes the senders.
    """

    def __init__(
        self, *, address: str, lease: float, clock: Callable[[], float], transport: Transport, metrics: Instruments
    ) -> None:
        self.boot_id = secrets.token_hex(8)
        self._address = address
        self._lease = lease
        self._clock = clock
        self._transport = transport
        self._held: dict[bytes, Held] = {}
        self._bytes = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._count_gauge = metrics.of("latentflow_tensors_held")
        self._bytes_gauge = metrics.of("latentflow_tensor_held_bytes")

    def __len__(self) -> int:
        return len(self._held)

    def put(self, tensor: torch.Tensor, *, request_id: str = "") -> tensors_pb2.Tensor:
        """A message for a tensor: a small one's has its values, another's the handle under which it is held from now on.

        Args:
            request_id: Of the request that it was made for; empty if it is not known.
        """
        tensor = tensor.detach()
        if codec.total_bytes([tensor]) <= INLINE_BYTES:
            return codec.inline(tensor)
        key = secrets.token_bytes(16)
        self._held[key] = Held(request_id, tensor, self._clock() + self._lease, self._transport.sender(constant=True))
        self._bytes += codec.total_bytes([tensor])
        self._report()
        return codec.described(
            tensor,
            tensors_pb2.Handle(owner=self._address, boot_id=self.boot_id, id=key, lease=self.lease()),
        )

    def get(self, *, boot_id: str, key: bytes) -> Held:
        """The tensor of a handle. OwnerLostError where this server does not hold it."""
        held = self._held.get(key) if boot_id == self.boot_id else None
        if held is None:
            raise OwnerLostError(
                f"{self._address} does not hold this tensor: it restarted, or the lease expired. "
                "Run the stage that produced it again.",
                details={"owner": self._address},
            )
        return held

    def renew(self, *, boot_id: str, keys: Iterable[bytes]) -> list[bytes]:
        """Extends leases; returns the keys that are not held here."""
        lost = []
        for key in keys:
            held = self._held.get(key) if boot_id == self.boot_id else None
            if held is None:
                lost.append(key)
            else:
                held.expires = self._clock() + self._lease
        return lost

    def release(self, *, boot_id: str, keys: Iterable[bytes], request_id: str = "") -> int:
        """Frees tensors; returns how many of them were held.

        Args:
            request_id: Frees also the tensors that were made for this request; empty: none.
        """
        released = list(keys) if boot_id == self.boot_id else []
        if request_id:
            released += [key for key, held in self._held.items() if held.request_id == request_id]
        return sum(self._drop(key) for key in released)

    def sweep(self) -> int:
        """Frees the tensors whose lease has expired; returns how many."""
        now = self._clock()
        return sum(self._drop(key) for key in [k for k, held in self._held.items() if held.expires <= now])

    async def emptied(self) -> None:
        """Returns when no tensor is held: all were released, or their leases have expired."""
        await self._empty.wait()

    def close(self) -> None:
        """Frees everything."""
        for key in list(self._held):
            self._drop(key)

    def lease(self) -> duration_pb2.Duration:
        duration = duration_pb2.Duration()
        duration.FromNanoseconds(int(self._lease * 1e9))
        return duration

    def _drop(self, key: bytes) -> bool:
        held = self._held.pop(key, None)
        if held is None:
            return False
        held.sender.close()
        self._bytes -= codec.total_bytes([held.tensor])
        self._report()
        return True

    def _report(self) -> None:
        (self._empty.clear if self._held else self._empty.set)()
        self._count_gauge.set(len(self._held))
        self._bytes_gauge.set(self._bytes)

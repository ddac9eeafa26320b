"""The tensors that a request holds at the model servers: their leases are renewed while it runs, and released when it ends.

A call that is cancelled may have been answered: the handles are then on their way, and only the server knows the tensors.
It releases those by the id of the request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grpc
from latentflow.v1 import tensors_pb2, tensors_pb2_grpc

from latentflow_gateway.replicas import Replica

_RENEW_SECONDS = 20.0
_RELEASE_SECONDS = 5.0


class Leases:
    """The leases of one request.

    Args:
        request_id: The id that the calls of the request carry.
        metadata: Makes the metadata of a call.
    """

    def __init__(self, request_id: str, metadata: Callable[[], list[tuple[str, str]]]) -> None:
        self._request_id = request_id
        self._metadata = metadata
        # Handles by id, with their owners: a draining owner may no longer be in the directory.
        self._held: dict[bytes, tuple[tensors_pb2.Handle, Replica]] = {}
        # Replicas that may hold tensors whose handles did not arrive.
        self._unanswered: set[Replica] = set()

    @contextlib.contextmanager
    def answering(self, owner: Replica) -> Iterator[None]:
        """Surrounds a call that makes tensors. Where it raises, `release` frees what the owner made for the request."""
        try:
            yield
        except BaseException:
            self._unanswered.add(owner)
            raise

    def hold(self, tensors: Iterable[tensors_pb2.Tensor], owner: Replica) -> None:
        """Adds the tensors that are held; small ones travel in the messages."""
        self._held.update({one.handle.id: (one.handle, owner) for one in tensors if one.HasField("handle")})

    async def renew(self) -> None:
        """Renews all leases again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            for (owner, boot_id), ids in self._owners().items():
                request = tensors_pb2.RenewRequest(boot_id=boot_id, ids=ids)
                # A lost owner is handled by the stage that reads its tensor.
                with contextlib.suppress(grpc.RpcError):
                    await tensors_pb2_grpc.TensorsStub(owner.channel).Renew(request, **self._call())

    async def release(self) -> None:
        """Releases all tensors."""
        releases = [
            (owner, tensors_pb2.ReleaseRequest(boot_id=boot_id, ids=ids))
            for (owner, boot_id), ids in self._owners().items()
        ]
        releases += [(owner, tensors_pb2.ReleaseRequest(request_id=self._request_id)) for owner in self._unanswered]
        self._held.clear()
        self._unanswered.clear()

        async def release_of(owner: Replica, request: tensors_pb2.ReleaseRequest) -> None:
            # Where the owner is unreachable, the leases expire.
            with contextlib.suppress(grpc.RpcError):
                await tensors_pb2_grpc.TensorsStub(owner.channel).Release(request, **self._call())

        await asyncio.gather(*(release_of(*one) for one in releases))

    def _owners(self) -> Mapping[tuple[Replica, str], list[bytes]]:
        """Ids of what is held, by owner and its boot id."""
        owners: dict[tuple[Replica, str], list[bytes]] = {}
        for handle, owner in self._held.values():
            owners.setdefault((owner, handle.boot_id), []).append(handle.id)
        return owners

    def _call(self) -> dict[str, Any]:
        return {"timeout": _RELEASE_SECONDS, "metadata": self._metadata()}

"""The LoRA store: the adapters of a folder, in host memory.

The store reads its folder again every few seconds. A new or changed file is read once it has not changed for that long, and
a file that cannot be used is described with its problem and affects no other. Earlier versions of a file stay in memory as
long as there is space, so that a request in flight ends with the version with which it began.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import structlog
from cachetools import LRUCache
from latentflow.errors import FailedPreconditionError, NotFoundError, UnavailableError
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, stage_pb2, tensors_pb2

from latentflow_nodes import families
from latentflow_nodes.adapters import folder, lora
from latentflow_nodes.adapters.folder import Entry
from latentflow_nodes.adapters.layers import layers_bytes, pack_layers
from latentflow_nodes.adapters.lora import Adapter
from latentflow_nodes.context import Context
from latentflow_nodes.roles.role import Role

_log = structlog.get_logger()
_CACHE_BYTES = 8 << 30
_SCAN_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class _Version:
    """What was last read of an entry of the folder."""

    entry: Entry
    signature: tuple[object, ...]
    description: control_pb2.AdapterDescription


class LoRAStore(Role):
    """The adapters of a folder."""

    calls = ("Adapter",)

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        self._folder = source.component or source.pipeline
        is_pipeline = (source.pipeline / "model_index.json").is_file()
        self.family = families.of_pipeline(source.pipeline).name if is_pipeline else ""
        self._components = [part.component for part in families.adapter_parts()]
        # By digest, so that several versions of one adapter may be there.
        self._cache: LRUCache[str, Adapter] = LRUCache(_CACHE_BYTES, getsizeof=_size)
        # Scans run in a thread of their own.
        self._cache_lock = threading.Lock()
        self._versions: Mapping[str, _Version] = {}
        self._seen: dict[str, tuple[object, ...]] = {}
        self._scanning: asyncio.Task[None] | None = None
        self._scan(settled=False)
        if not self._versions:
            _log.warning("the store has no adapter yet", folder=str(self._folder))

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        response.lora_store.adapters.extend(version.description for version in self._versions.values())

    async def warm_up(self) -> None:
        """Nothing has to run; from here on the folder is followed."""
        self._scanning = asyncio.create_task(self._follow())

    def close(self) -> None:
        if self._scanning is not None:
            self._scanning.cancel()

    async def adapter(self, request: stage_pb2.AdapterRequest) -> Iterator[tensors_pb2.TensorChunk]:
        """The chunks of one component's part; a bundle of no tensor where the adapter has none."""
        adapter = await self._find(request.name, request.digest)
        layers = pack_layers(adapter.components.get(request.component, {}))
        return self._context.transport.sender().pieces(layers, memory="")

    async def _find(self, name: str, digest: str) -> Adapter:
        version = self._versions.get(name)
        if not digest:
            if version is None:
                raise NotFoundError(
                    f"There is no adapter {name!r} in this store; it has {', '.join(self._versions) or 'none'}.",
                    reason=Reason.UNKNOWN_ADAPTER,
                )
            digest = version.description.digest
            if not digest:
                raise FailedPreconditionError(version.description.problem, reason=Reason.ADAPTER_UNREADABLE)
        with self._cache_lock:
            adapter = self._cache.get(digest)
        if adapter is None:
            # Too large to keep, or in a file that another replica of this store has seen first.
            adapter = await asyncio.to_thread(self._read, name)
            if adapter is None or adapter.digest != digest:
                raise UnavailableError(
                    f"The file of adapter {name!r} has been replaced or removed, and the version with which this request "
                    "began is no longer in memory; send the request again.",
                    reason=Reason.ADAPTER_CHANGED,
                )
            self._keep(adapter)
        return adapter

    def _read(self, name: str) -> Adapter | None:
        """The adapter that the folder has now; None where it has none that can be used."""
        try:
            return lora.load(folder.find(self._folder, self._components)[name])
        except (OSError, KeyError, FailedPreconditionError):
            return None

    async def _follow(self) -> None:
        failure = ""
        while True:
            await asyncio.sleep(_SCAN_SECONDS)
            try:
                await asyncio.to_thread(self._scan, settled=True)
                failure = ""
            except OSError as error:
                # A volume that is away for a while; what is in memory is served meanwhile.
                if str(error) != failure:
                    _log.warning("the folder cannot be read", folder=str(self._folder), problem=str(error))
                failure = str(error)

    def _scan(self, *, settled: bool) -> None:
        """Reads what has changed in the folder.

        Args:
            settled: Read only files that are as the scan before saw them, because others may still be written.
        """
        entries = folder.find(self._folder, self._components)
        signatures = {name: entry.signature() for name, entry in entries.items()}
        versions: dict[str, _Version] = {}
        for name, entry in entries.items():
            known = self._versions.get(name)
            if known is None or known.signature != signatures[name]:
                is_settled = not settled or self._seen.get(name) == signatures[name]
                read = self._version(entry, signatures[name]) if is_settled else None
                # What was written to while it was read may be half of each version; a later scan reads it again.
                known = read if read is not None and entry.signature() == signatures[name] else known
            if known is not None:
                versions[name] = known
        for name in self._versions.keys() - versions.keys():
            _log.info("adapter removed", adapter=name)
        self._seen = signatures
        self._versions = versions
        digests = "".join(version.description.digest for version in versions.values())
        self.content_digest = hashlib.sha256(digests.encode()).hexdigest()

    def _version(self, entry: Entry, signature: tuple[object, ...]) -> _Version:
        try:
            adapter = lora.load(entry)
        except FailedPreconditionError as error:
            _log.warning("adapter cannot be served", adapter=entry.name, problem=error.message)
            description = control_pb2.AdapterDescription(name=entry.name, problem=error.message)
        else:
            _log.info("adapter read", adapter=entry.name, digest=adapter.digest)
            self._keep(adapter)
            description = control_pb2.AdapterDescription(
                name=entry.name, components=list(adapter.components), digest=adapter.digest, rank=adapter.rank
            )
        return _Version(entry=entry, signature=signature, description=description)

    def _keep(self, adapter: Adapter) -> None:
        if _size(adapter) <= _CACHE_BYTES:
            with self._cache_lock:
                self._cache[adapter.digest] = adapter


def _size(adapter: Adapter) -> int:
    return 1 + sum(layers_bytes(layers) for layers in adapter.components.values())

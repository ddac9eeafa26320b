"""The adapters of a folder, in host memory: what the folder has now, and the versions that requests still use.

`scan` reads what has changed in the folder. A new or changed file is read once two scans have seen it alike, because another
process may still be writing it. A file that cannot be used is listed with its problem and affects no other. Earlier versions
of an adapter stay in memory as long as there is space, so that a request ends with the version with which it began.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from cachetools import LRUCache
from latentflow.errors import FailedPreconditionError, NotFoundError, UnavailableError
from latentflow.reasons import Reason

from latentflow_nodes import families
from latentflow_nodes.adapters import folder, lora
from latentflow_nodes.adapters.folder import Entry
from latentflow_nodes.adapters.layers import layers_bytes
from latentflow_nodes.adapters.lora import Adapter

_log = structlog.get_logger()
_CACHE_BYTES = 8 << 30


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An adapter of the folder.

    Attributes:
        signature: That of its files when they were read.
        problem: Why it cannot be used, in one sentence; all that follows is then empty.
        rank: Highest rank of its layers.
    """

    name: str
    signature: tuple[object, ...]
    problem: str = ""
    digest: str = ""
    components: tuple[str, ...] = ()
    rank: int = 0


class Library:
    """The adapters of a folder. Thread-safe; one scan at a time.

    Args:
        cache_bytes: Memory for the layers of adapters.
    """

    def __init__(self, path: Path, *, cache_bytes: int = _CACHE_BYTES) -> None:
        self._folder = path
        self._components = [part.component for part in families.adapter_parts()]
        self._lock = threading.Lock()
        # By digest, so that several versions of one adapter may be there.
        self._cache: LRUCache[str, Adapter] = LRUCache(cache_bytes, getsizeof=_size)
        self._seen: dict[str, tuple[object, ...]] = {}
        self.listed: Mapping[str, Listed] = {}

    def scan(self, *, settled: bool = True) -> None:
        """Reads what has changed in the folder. OSError where the folder itself cannot be read.

        Args:
            settled: Read only files that the scan before saw alike; False for the first scan.
        """
        entries = folder.find(self._folder, self._components)
        signatures = {name: entry.signature() for name, entry in entries.items()}
        listed: dict[str, Listed] = {}
        for name, entry in entries.items():
            known = self.listed.get(name)
            if known is None or known.signature != signatures[name]:
                is_settled = not settled or self._seen.get(name) == signatures[name]
                read = self._read(entry, signatures[name]) if is_settled else None
                # What was written to while it was read may be half of each version; a later scan reads it again.
                known = read if read is not None and entry.signature() == signatures[name] else known
            if known is not None:
                listed[name] = known
        for name in self.listed.keys() - listed.keys():
            _log.info("LoRA removed", adapter=name)
        self._seen = signatures
        self.listed = listed

    def get(self, name: str, digest: str = "") -> Adapter:
        """An adapter. May read its files.

        Args:
            digest: The version; empty: what the folder has now.

        Raises:
            NotFoundError: The folder has no such adapter.
            FailedPreconditionError: It cannot be used.
            UnavailableError: Its files have changed, and this version is no longer in memory.
        """
        if not digest:
            listed = self.listed.get(name)
            if listed is None:
                raise NotFoundError(
                    f"There is no LoRA {name!r} in this store; it has {', '.join(self.listed) or 'none'}.",
                    reason=Reason.UNKNOWN_ADAPTER,
                )
            if listed.problem:
                raise FailedPreconditionError(listed.problem, reason=Reason.ADAPTER_UNREADABLE)
            digest = listed.digest
        with self._lock:
            kept = self._cache.get(digest)
        if kept is not None:
            return kept
        # No longer in memory, or a version that another replica of this store has seen first.
        adapter = self._present(name)
        if adapter is None or adapter.digest != digest:
            raise UnavailableError(
                f"The files of the LoRA {name!r} have been replaced or removed, and the version with which this request began "
                "is no longer in memory; send the request again.",
                reason=Reason.ADAPTER_CHANGED,
            )
        self._keep(adapter)
        return adapter

    def drop(self) -> None:
        """Frees the memory of all adapters; they stay listed, and `get` reads their files again."""
        with self._lock:
            self._cache.clear()

    def _present(self, name: str) -> Adapter | None:
        """The adapter that the folder has now, whatever was listed; None where it has none that can be used."""
        try:
            return lora.load(folder.find(self._folder, self._components)[name])
        except (OSError, KeyError, FailedPreconditionError):
            return None

    def _read(self, entry: Entry, signature: tuple[object, ...]) -> Listed:
        try:
            adapter = lora.load(entry)
        except FailedPreconditionError as error:
            _log.warning("LoRA cannot be used", adapter=entry.name, problem=error.message)
            return Listed(name=entry.name, signature=signature, problem=error.message)
        _log.info("LoRA read", adapter=entry.name, digest=adapter.digest)
        self._keep(adapter)
        return Listed(
            name=entry.name,
            signature=signature,
            digest=adapter.digest,
            components=tuple(adapter.components),
            rank=adapter.rank,
        )

    def _keep(self, adapter: Adapter) -> None:
        with self._lock:
            if _size(adapter) <= self._cache.maxsize:
                self._cache[adapter.digest] = adapter


def _size(adapter: Adapter) -> int:
    return 1 + sum(layers_bytes(layers) for layers in adapter.components.values())

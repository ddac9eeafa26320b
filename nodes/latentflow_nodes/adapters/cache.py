"""The adapters that this server has pulled from LoRA stores: the recent ones, each pulled once for all requests.

Adapters are kept after a request, so that the next request for the same ones need not pull them. Requests that need an
adapter while it is pulled share the pull.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cachetools import LRUCache

from latentflow_nodes.adapters.layers import Layers, layers_bytes


class AdapterCache:
    """Adapters by digest and component; the least recently used are dropped. Used from one event loop.

    Args:
        limit: Most bytes that it keeps.
    """

    def __init__(self, limit: int) -> None:
        self._kept: LRUCache[tuple[str, str], Layers] = LRUCache(
            limit, getsizeof=lambda layers: 1 + layers_bytes(layers)
        )
        self._pulls: dict[tuple[str, str, str], asyncio.Task[Layers]] = {}

    async def get(self, digest: str, component: str, *, store: str, pull: Callable[[], Awaitable[Layers]]) -> Layers:
        """One component's part of an adapter: the kept one, or that of the pull in flight, or of a new pull.

        Args:
            store: The address that `pull` pulls from. Only requests with the same one share a pull, and its error, which
                names the store.
        """
        kept = self._kept.get((digest, component))
        if kept is not None:
            return kept
        key = (digest, component, store)
        if key not in self._pulls:
            self._pulls[key] = asyncio.create_task(self._pull(key, pull))
        # A request that is cancelled ends its own wait only.
        return await asyncio.shield(self._pulls[key])

    def clear(self) -> None:
        """Drops the kept adapters."""
        self._kept.clear()

    async def close(self) -> None:
        """Cancels the pulls in flight."""
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)

    async def _pull(self, key: tuple[str, str, str], pull: Callable[[], Awaitable[Layers]]) -> Layers:
        try:
            layers = await pull()
        finally:
            del self._pulls[key]
        if layers_bytes(layers) < self._kept.maxsize:
            self._kept[key[:2]] = layers
        return layers

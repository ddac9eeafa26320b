"""The adapters of a request at its denoiser: loaded before the first step, or during the first steps if the request allows it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

from latentflow.v1 import stage_pb2

from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine.sample import LateAdapters
from latentflow_nodes.roles.guests import adapter_key
from latentflow_nodes.tensors.peers import Peers

Adapters = tuple[tuple[Layers, float], ...]


class LoadingAdapters:
    """Loads the adapters of one request. Runs in the event loop.

    Args:
        component: Folder of the network in its pipeline, whose part of the adapters is loaded.
        may_be_late: The request may begin without them, for `async_steps` of its adapters.
    """

    def __init__(
        self,
        peers: Peers,
        refs: Sequence[stage_pb2.AdapterRef],
        *,
        component: str,
        merger: Merger,
        may_be_late: bool,
    ) -> None:
        self._peers = peers
        self._refs = refs
        self._component = component
        self._merger = merger
        self._loaded: Future[Adapters] = Future()
        # All take effect at the same step, so the strictest bound holds.
        self._steps = min((ref.async_steps for ref in refs), default=0) if may_be_late else 0
        self._task = asyncio.create_task(self._load())
        self._task.add_done_callback(self._resolve)

    async def before_first_step(self) -> Adapters:
        """The adapters of the first step: all of them, or none if they may be late. Raises why they cannot be used."""
        return () if self._steps else await self._task

    def late(self) -> LateAdapters | None:
        """The adapters that take effect later; None: all are in effect from the first step on."""
        if not self._steps:
            return None
        return LateAdapters(loaded=self._loaded, key=adapter_key(self._refs), steps=self._steps)

    def cancel(self) -> None:
        self._task.cancel()

    async def _load(self) -> Adapters:
        adapters = await self._peers.adapters(self._refs, self._component)
        for ref, (layers, _) in zip(self._refs, adapters, strict=True):
            self._merger.check(ref.name, layers)
        return tuple(adapters)

    def _resolve(self, task: asyncio.Task[Adapters]) -> None:
        if task.cancelled():
            self._loaded.cancel()
        elif error := task.exception():
            self._loaded.set_exception(error)
        else:
            self._loaded.set_result(task.result())

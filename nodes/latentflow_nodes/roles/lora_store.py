"""The LoRA store: serves the adapters of a folder, and follows the folder while it is awake."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator

import structlog
from latentflow.v1 import control_pb2, stage_pb2, tensors_pb2

from latentflow_nodes import families
from latentflow_nodes.adapters.layers import pack_layers
from latentflow_nodes.adapters.library import Library
from latentflow_nodes.context import Context
from latentflow_nodes.roles.role import Role, does_not_load

_log = structlog.get_logger()
# A changed file is in use after one to two of these. Notifications of the system do not work on network file systems.
_SCAN_SECONDS = 2.0


class LoRAStore(Role):
    """The adapters of a folder, which may have none yet."""

    calls = ("Adapter",)

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        self._folder = source.alone
        self.family = families.of_pipeline(source.pipeline).name if source.is_pipeline else ""
        self._library = Library(self._folder)
        self._scan(settled=False)
        if not self._library.listed:
            _log.warning("the folder has no LoRA yet", folder=str(self._folder))
        self._following: asyncio.Task[None] | None = None
        # Adapters are in host memory.
        self.weights_bytes = 0

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        for listed in self._library.listed.values():
            response.lora_store.adapters.add(
                name=listed.name,
                components=listed.components,
                digest=listed.digest,
                rank=listed.rank,
                problem=listed.problem,
            )

    async def warm_up(self) -> None:
        """Nothing has to run; from here on the folder is followed."""
        self._following = asyncio.create_task(self._follow())

    async def sleep(self) -> None:
        self.close()
        self._library.drop()

    async def wake(self) -> None:
        try:
            await asyncio.to_thread(self._scan, settled=False)
        except OSError as error:
            raise does_not_load(self._context.settings, error) from error
        await self.warm_up()

    def close(self) -> None:
        if self._following is not None:
            self._following.cancel()

    async def adapter(self, request: stage_pb2.AdapterRequest) -> Iterator[tensors_pb2.TensorChunk]:
        """The chunks of one component's part; a bundle of no tensor where the adapter has none."""
        adapter = await asyncio.to_thread(self._library.get, request.name, request.digest)
        layers = pack_layers(adapter.components.get(request.component, {}))
        return self._context.transport.sender().pieces(layers, memory="")

    async def _follow(self) -> None:
        failure = ""
        while True:
            await asyncio.sleep(_SCAN_SECONDS)
            try:
                await asyncio.to_thread(self._scan, settled=True)
                failure = ""
            except OSError as error:
                # Such as a volume that is away for a while; what is in memory is served meanwhile.
                if str(error) != failure:
                    _log.warning("the folder cannot be read", folder=str(self._folder), problem=str(error))
                failure = str(error)

    def _scan(self, *, settled: bool) -> None:
        self._library.scan(settled=settled)
        digests = "".join(listed.digest for listed in self._library.listed.values())
        self.content_digest = hashlib.sha256(digests.encode()).hexdigest()

"""The LoRA store: adapters in host memory, read from their files when first asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import structlog
from cachetools import LRUCache
from latentflow.errors import FailedPreconditionError, LatentflowError, NotFoundError
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, stage_pb2, tensors_pb2

from latentflow_nodes import families
from latentflow_nodes.adapters import lora
from latentflow_nodes.adapters.layers import layers_bytes, pack_layers
from latentflow_nodes.adapters.lora import Adapter
from latentflow_nodes.context import Context
from latentflow_nodes.roles.role import Role
from latentflow_nodes.weights import files

_log = structlog.get_logger()
_CACHE_BYTES = 8 << 30


class LoRAStore(Role):
    """The adapters of a folder."""

    calls = ("Adapter",)

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        folder = source.component or source.pipeline
        is_pipeline = (source.pipeline / "model_index.json").is_file()
        self.family = families.of_pipeline(source.pipeline).name if is_pipeline else ""
        self._files = lora.find(folder)
        if not self._files:
            raise FailedPreconditionError(
                f"{folder} holds no adapter: neither *.safetensors nor a folder with {' or '.join(lora.FILE_NAMES)}.",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            )
        self._cache: LRUCache[str, Adapter] = LRUCache(_CACHE_BYTES, getsizeof=_size)
        self._descriptions = [self._description(name, path) for name, path in self._files.items()]
        self.content_digest = files.digest(list(self._files.values()))

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        response.lora_store.adapters.extend(self._descriptions)

    async def warm_up(self) -> None:
        """Nothing to run: the adapters were read at the start."""

    def close(self) -> None:
        """It has no thread."""

    async def adapter(self, request: stage_pb2.AdapterRequest) -> Iterator[tensors_pb2.TensorChunk]:
        """The chunks of one component's part; a bundle of no tensor where the adapter has none."""
        if request.name not in self._files:
            raise NotFoundError(
                f"There is no adapter {request.name!r} in this store; it has {', '.join(self._files)}.",
                reason=Reason.UNKNOWN_ADAPTER,
            )
        adapter = self._cache.get(request.name)
        if adapter is None:
            adapter = await asyncio.to_thread(lora.load, request.name, self._files[request.name])
            self._keep(adapter)
        layers = pack_layers(adapter.components.get(request.component, {}))
        return self._context.transport.sender().pieces(layers, memory="")

    def _keep(self, adapter: Adapter) -> None:
        if _size(adapter) <= _CACHE_BYTES:
            self._cache[adapter.name] = adapter

    def _description(self, name: str, path: Path) -> control_pb2.AdapterDescription:
        try:
            adapter = lora.load(name, path)
        except LatentflowError as error:
            # The other adapters are served all the same.
            _log.warning("adapter cannot be served", adapter=name, problem=error.message)
            return control_pb2.AdapterDescription(name=name, problem=error.message)
        self._keep(adapter)
        return control_pb2.AdapterDescription(
            name=name, components=list(adapter.components), digest=adapter.digest, rank=adapter.rank
        )


def _size(adapter: Adapter) -> int:
    return 1 + sum(layers_bytes(layers) for layers in adapter.components.values())

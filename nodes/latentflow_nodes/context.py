"""What a role works with: settings, metrics, load, transport, held tensors, peers, the compute lock."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from latentflow.api.types import Source
from latentflow.internal.metrics import Instruments
from latentflow.internal.source_folder import SourceFolder

from latentflow_nodes import families
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.load import Load
from latentflow_nodes.settings import NodeSettings
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.store import TensorStore
from latentflow_nodes.tensors.transfer import Transport
from latentflow_nodes.weights.fetching import Progress
from latentflow_nodes.weights.source import locate

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Context:
    settings: NodeSettings
    metrics: Instruments
    load: Load
    transport: Transport
    store: TensorStore
    peers: Peers
    compute_lock: ComputeLock

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.engine.device)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.settings.dtype]

    def source(self) -> SourceFolder:
        """The model's folder; downloads it where it is remote."""
        settings = self.settings
        return self._located(settings.uri, settings.subfolder, settings.revision, settings.variant)

    def folder_of(self, source: Source) -> SourceFolder:
        """The folder of another source of the model's role; downloads it where it is remote."""
        return self._located(source.uri, source.subfolder, source.revision, source.variant)

    def _located(self, uri: str, subfolder: str | None, revision: str | None, variant: str | None) -> SourceFolder:
        settings = self.settings
        return locate(
            uri=uri,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            role=settings.role,
            parts=families.parts(settings.role),
            model_root=settings.model_root,
            cache=settings.cache,
            progress=Progress(self.metrics, source=uri),
        )

"""A gateway and model servers in the process of a test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.api import DiffusionWorkflow, identity, load_workflows
from latentflow.api.types import Engine, Role
from latentflow.internal.directory import Directory, Replicas
from latentflow.internal.rpc import Tls
from latentflow_gateway.server import Gateway
from latentflow_gateway.server import serve as serve_gateway
from latentflow_gateway.settings import GatewaySettings
from latentflow_nodes.server import Node
from latentflow_nodes.server import serve as serve_node
from latentflow_nodes.settings import NodeSettings

from support.packs import MODELS
from support.paths import EXAMPLES

PROMPT = "a large red circle on the left, white background"
WORKFLOW = load_workflows(EXAMPLES / "shapes-minimal.yaml")[0]
SHAPES = load_workflows(EXAMPLES / "shapes.yaml")[0]


@dataclass(frozen=True, kw_only=True)
class Served:
    gateway: Gateway
    nodes: list[Node]

    def node(self, role: str) -> Node:
        return next(node for node in self.nodes if node.context.settings.role == role)


@contextlib.asynccontextmanager
async def served(
    folder: Path,
    *,
    workflow: DiffusionWorkflow = WORKFLOW,
    tls: Tls | None = None,
    client_tls: Tls | None = None,
    token: str | None = None,
    api_keys: Path | None = None,
    host: str = "127.0.0.1",
    denoisers: int = 1,
    control_nets: int = 1,
    **limits: Any,
) -> AsyncIterator[Served]:
    """A workflow's model servers and a gateway, in this process.

    Args:
        host: Where all of them listen.
        denoisers, control_nets: Replicas of the denoiser, and of each ControlNet.
        limits: Further settings of the gateway.
    """
    async with contextlib.AsyncExitStack() as stack:
        nodes, models = [], {}
        for model in workflow.spec.models:
            assert model.source is not None
            settings = NodeSettings(
                role=model.role.value,
                uri=model.source.uri,
                subfolder=model.source.subfolder,
                nets=tuple(model.nets or ()),
                model_root=MODELS,
                identity=identity(model),
                tls=tls,
                engine=Engine(threads=1),
                token=token,
                listen=f"{host}:0",
                metrics=f"{host}:0",
            )
            count = {Role.DENOISER: denoisers, Role.CONTROL_NET: control_nets}.get(model.role, 1)
            replicas = [await stack.enter_async_context(serve_node(settings)) for _ in range(count)]
            nodes += replicas
            models[identity(model)] = Replicas(role=model.role, replicas=tuple(one.address for one in replicas))
        directory = folder / "directory.json"
        Directory(workflows=(workflow,), models=models).write(directory)
        settings_of_gateway = GatewaySettings(
            directory=directory,
            listen=f"{host}:0",
            http=f"{host}:0",
            metrics=f"{host}:0",
            tls=client_tls,
            node_tls=tls,
            token=token,
            api_keys=api_keys,
            **({"ready_seconds": 3.0} | limits),
        )
        gateway = await stack.enter_async_context(serve_gateway(settings_of_gateway))
        yield Served(gateway=gateway, nodes=nodes)


@contextlib.asynccontextmanager
async def without_servers(folder: Path, **settings: Any) -> AsyncIterator[Gateway]:
    """A gateway for two workflows whose models have no servers."""
    directory = folder / "directory.json"
    Directory(workflows=(WORKFLOW, SHAPES), models={}).write(directory)
    async with serve_gateway(
        GatewaySettings(directory=directory, listen="127.0.0.1:0", http="127.0.0.1:0", **settings)
    ) as gateway:
        yield gateway

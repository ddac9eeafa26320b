"""Every model of a workflow on two hosts of this machine, behind a gateway: a cluster of two pods in one process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from latentflow.api import Role, identity, load_workflows
from latentflow.api.types import Engine
from latentflow.internal.directory import Directory, Replicas
from latentflow_gateway.server import serve as serve_gateway
from latentflow_gateway.settings import GatewaySettings
from latentflow_nodes.server import Node
from latentflow_nodes.server import serve as serve_node
from latentflow_nodes.settings import NodeSettings

from support.packs import MODELS
from support.paths import EXAMPLES
from support.scraping import value

HOSTS = ("127.0.0.1", "127.0.0.2")
(WHOLE,) = load_workflows(EXAMPLES / "shapes-colocated.yaml")


@dataclass(frozen=True, kw_only=True)
class Pods:
    """A gateway's address, and the server of each model on each host. The text encoder is on the first host only."""

    gateway: str
    nodes: dict[tuple[str, str], Node]

    def calls(self, host: str, name: str) -> float:
        """Requests that the server of a model on a host has served."""
        metrics = f"127.0.0.1:{self.nodes[host, name].metrics_port}"
        return value(metrics, "latentflow_requests_total", code="OK") - value(
            metrics, "latentflow_requests_total", code="OK", call="Describe"
        )


@contextlib.asynccontextmanager
async def pods(folder: Path, *missing: tuple[str, str]) -> AsyncIterator[Pods]:
    """Every model on both hosts, except the `missing`."""
    async with contextlib.AsyncExitStack() as stack:
        nodes: dict[tuple[str, str], Node] = {}
        for model in WHOLE.spec.models:
            assert model.source is not None
            for host in HOSTS[:1] if model.role is Role.TEXT_ENCODER else HOSTS:
                if (host, model.name) in missing or model.name == "layout":
                    continue
                settings = NodeSettings(
                    role=model.role.value,
                    uri=model.source.uri,
                    subfolder=model.source.subfolder,
                    model_root=MODELS,
                    identity=identity(model),
                    engine=Engine(threads=1),
                    listen=f"{host}:0",
                )
                nodes[host, model.name] = await stack.enter_async_context(serve_node(settings))
        models = {
            identity(model): Replicas(
                role=model.role, replicas=tuple(node.address for (_, name), node in nodes.items() if name == model.name)
            )
            for model in WHOLE.spec.models
        }
        directory = folder / "directory.json"
        Directory(workflows=(WHOLE,), models=models).write(directory)
        settings_of_gateway = GatewaySettings(directory=directory, listen="127.0.0.1:0")
        gateway = await stack.enter_async_context(serve_gateway(settings_of_gateway))
        yield Pods(gateway=gateway.address, nodes=nodes)

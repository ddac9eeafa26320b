"""The gateway in a cluster: what it learns from watches, and that it serves with it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from kube.simulated_kubelet import workflow
from latentflow import AsyncClient
from latentflow.api import Role, identity
from latentflow.api.types import Engine
from latentflow.internal.directory import Directory
from latentflow_gateway import cluster
from latentflow_gateway.server import serve as serve_gateway
from latentflow_gateway.settings import GatewaySettings
from latentflow_nodes.server import Node
from latentflow_nodes.server import serve as serve_node
from latentflow_nodes.settings import NodeSettings
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, new_namespace
from support.packs import MODELS
from support.serving import PROMPT, WORKFLOW, served


@pytest.fixture
def namespace(api_server: ApiServer, accounts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    monkeypatch.setenv("KUBECONFIG", str(accounts["gateway"]))
    with new_namespace(api_server, "gateway") as created:
        yield created


def endpoints(model: str, role: str, address: str) -> Body:
    """An EndpointSlice as Kubernetes creates it for a model's Service."""
    host, _, port = address.rpartition(":")
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": model,
            "labels": {"latentflow.io/model": model, "latentflow.io/role": role, "kubernetes.io/service-name": model},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [host], "conditions": {"ready": True}}],
        "ports": [{"name": "grpc", "port": int(port)}],
    }


def bind(namespace: Namespace, **models: str) -> None:
    """Writes a workflow's bindings in the form of the operator."""
    roles = {model["name"]: model["role"] for model in workflow()["spec"]["models"]}
    entries = [{"name": name, "role": roles[name], "model": model} for name, model in models.items()]
    namespace.patch("DiffusionWorkflow", "shapes", {"status": {"models": entries}}, subresource="status")


@contextlib.asynccontextmanager
async def following(
    namespace: Namespace,
) -> AsyncIterator[Callable[[Callable[[Directory], bool]], Awaitable[Directory]]]:
    """Yields a function that waits for a state of the gateway's directory."""
    async with contextlib.aclosing(cluster.follow((namespace.name,))) as states:

        async def until(condition: Callable[[Directory], bool]) -> Directory:
            async with asyncio.timeout(30):
                async for state in states:
                    if condition(state):
                        return state
            raise AssertionError("the directory has ended")

        yield until


async def test_the_directory_follows_changes_of_workflows_bindings_and_replicas(namespace: Namespace) -> None:
    async with following(namespace) as until:
        assert (await until(lambda state: True)).workflows == ()
        await asyncio.to_thread(namespace.create, workflow())
        state = await until(lambda state: len(state.workflows) == 1)
        named = {model.name: identity(model) for model in state.workflows[0].spec.models}
        assert named["base"].startswith(f"{namespace.name}/denoiser-")
        old = f"{namespace.name}/denoiser-old"
        # A changed model serves only after the workflow's status names it.
        await asyncio.to_thread(bind, namespace, base="denoiser-old")
        await until(lambda state: identity(state.workflows[0].of_role(Role.DENOISER)[0]) == old)
        await asyncio.to_thread(namespace.create, endpoints("denoiser-old", "Denoiser", "192.0.2.9:8500"))
        state = await until(lambda state: old in state.models)
        assert state.models[old].replicas == ("192.0.2.9:8500",)
        await asyncio.to_thread(namespace.delete, "EndpointSlice", "denoiser-old")
        await until(lambda state: not state.models)
        await asyncio.to_thread(namespace.delete, "DiffusionWorkflow", "shapes")
        await until(lambda state: not state.workflows)


def test_models_with_one_name_in_two_namespaces_are_different() -> None:
    """The same relative URI is a folder of another claim in another namespace."""
    slices = [
        endpoints("denoiser-1", "Denoiser", f"192.0.2.{number}:8500") for number, _ in enumerate(("art", "photos"))
    ]
    for body, name in zip(slices, ("art", "photos"), strict=True):
        body["metadata"]["namespace"] = name
    found = cluster.directory([], slices).models
    assert {name: model.replicas for name, model in found.items()} == {
        "art/denoiser-1": ("192.0.2.0:8500",),
        "photos/denoiser-1": ("192.0.2.1:8500",),
    }


async def test_a_gateway_in_a_cluster_returns_the_pixels_of_the_embedded_runtime(
    namespace: Namespace, tmp_path: Path
) -> None:
    async with served(tmp_path) as servers, AsyncClient(servers.gateway.address) as client:
        wanted = (await client.generate(PROMPT, steps=2, seed=3, timeout=60)).image
    async with contextlib.AsyncExitStack() as stack:
        body = WORKFLOW.model_dump(mode="json", by_alias=True, exclude_none=True)
        body["metadata"] = {"name": WORKFLOW.name}
        await asyncio.to_thread(namespace.create, body)
        for model in WORKFLOW.spec.models:
            settings = NodeSettings(
                role=model.role.value,
                uri="shapes",
                model_root=MODELS,
                identity=identity(model),
                engine=Engine(threads=1),
                listen=f"{_own_address()}:0",
            )
            node: Node = await stack.enter_async_context(serve_node(settings))
            await asyncio.to_thread(namespace.create, endpoints(identity(model), model.role.value, node.address))
        gateway = await stack.enter_async_context(
            serve_gateway(GatewaySettings(directory=None, namespaces=(namespace.name,), listen="127.0.0.1:0"))
        )
        client = await stack.enter_async_context(AsyncClient(gateway.address))
        result = await client.generate(
            PROMPT, workflow=f"{namespace.name}/{WORKFLOW.name}", steps=2, seed=3, timeout=60
        )
        assert result.image.tobytes() == wanted.tobytes()


def _own_address() -> str:
    """An address of this machine that an EndpointSlice may contain; it may not contain loopback addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])

"""LoRA files are added and replaced while a workflow is served, and one that cannot be used is described with its problem."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from latentflow import AsyncClient
from latentflow.api import Role, identity, load_workflows
from latentflow.api.types import Engine
from latentflow.errors import FailedPreconditionError
from latentflow.internal.directory import Directory, Replicas
from latentflow.reasons import Reason
from latentflow.results import WorkflowModel
from latentflow_gateway import replicas
from latentflow_gateway.server import serve as serve_gateway
from latentflow_gateway.settings import GatewaySettings
from latentflow_nodes.roles import lora_store
from latentflow_nodes.server import serve as serve_node
from latentflow_nodes.settings import NodeSettings
from support.packs import MODELS, SHAPES
from support.paths import EXAMPLES

(WORKFLOW,) = load_workflows(EXAMPLES / "shapes.yaml")
SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A gateway's address, its client, and the folder of the workflow's LoRA store."""

    gateway: str
    client: AsyncClient
    folder: Path

    async def store(self) -> WorkflowModel:
        described = await self.client.describe()
        return next(model for model in described.models if model.role == "LoRAStore")

    async def until(self, *, usable: set[str], unusable: Collection[str] = ()) -> WorkflowModel:
        """The store's description once it has exactly these adapters."""
        async with asyncio.timeout(SECONDS):
            while True:
                store = await self.store()
                if (set(store.adapters), set(store.unusable_adapters)) == (usable, set(unusable)):
                    return store

    async def image(self, name: str) -> bytes:
        made = await self.client.generate("a red circle", seed=3, steps=3, loras={name: 1.0}, timeout=SECONDS)
        return made.image.tobytes()


@pytest_asyncio.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """The shapes workflow without ControlNets, whose store has a folder of its own with one good file and one bad one."""
    monkeypatch.setattr(lora_store, "_SCAN_SECONDS", 0.05)
    monkeypatch.setattr(replicas, "_REREAD_SECONDS", 0.05)
    folder = tmp_path / "shapes/loras"
    folder.mkdir(parents=True)
    add(folder / "outline.safetensors", "outline")
    (folder / "odd.safetensors").write_text("[bold]no tensors[/]")
    async with contextlib.AsyncExitStack() as stack:
        models = {}
        for model in WORKFLOW.spec.models:
            assert model.source is not None
            if model.name in ("edges", "layout"):
                continue
            settings = NodeSettings(
                role=model.role.value,
                uri=model.source.uri,
                subfolder=model.source.subfolder,
                model_root=tmp_path if model.role is Role.LORA_STORE else MODELS,
                identity=identity(model),
                engine=Engine(threads=1),
            )
            node = await stack.enter_async_context(serve_node(settings))
            models[identity(model)] = Replicas(role=model.role, replicas=(node.address,))
        directory = tmp_path / "directory.json"
        Directory(workflows=(WORKFLOW,), models=models).write(directory)
        gateway = await stack.enter_async_context(
            serve_gateway(GatewaySettings(directory=directory, listen="127.0.0.1:0"))
        )
        client = await stack.enter_async_context(AsyncClient(gateway.address))
        yield Served(gateway=gateway.address, client=client, folder=folder)


def add(path: Path, style: str) -> None:
    """A file in one step, as careful tools write it."""
    shutil.copy(SHAPES / "loras" / style / "pytorch_lora_weights.safetensors", path.with_name(".partial"))
    path.with_name(".partial").rename(path)


async def test_an_unusable_lora_is_described_with_its_problem_and_refused(served: Served) -> None:
    store = await served.until(usable={"outline"}, unusable={"odd"})
    assert "odd.safetensors is damaged or incomplete" in store.unusable_adapters["odd"]
    with pytest.raises(FailedPreconditionError, match="LoRA 'odd' cannot be used: odd") as caught:
        await served.image("odd")
    assert caught.value.reason == Reason.ADAPTER_UNREADABLE
    command = [sys.executable, "-c", "from latentflow.cli import main; main()", "describe", "--target", served.gateway]
    printed = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=SECONDS)
    (usable,) = (line for line in printed.stdout.splitlines() if line.startswith("LoRAs"))
    assert usable.split() == ["LoRAs", "outline"]
    # In one line, because the output is no terminal.
    (problem,) = (line for line in printed.stdout.splitlines() if line.startswith("unusable LoRA 'odd'"))
    assert problem.endswith(store.unusable_adapters["odd"])


async def test_loras_are_added_replaced_and_removed_without_a_restart(served: Served) -> None:
    await served.until(usable={"outline"}, unusable={"odd"})
    outline = await served.image("outline")
    add(served.folder / "mine.safetensors", "neon")
    (served.folder / "odd.safetensors").unlink()
    await served.until(usable={"outline", "mine"})
    neon = await served.image("mine")
    assert neon != outline
    add(served.folder / "mine.safetensors", "outline")
    async with asyncio.timeout(SECONDS):
        while await served.image("mine") != outline:
            pass
    (served.folder / "mine.safetensors").unlink()
    await served.until(usable={"outline"})

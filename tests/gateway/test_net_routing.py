"""Requests for several nets of one ControlNet, through a gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from latentflow import AsyncClient, ControlImage, pngmeta, requests
from latentflow.api import Role, identity, load_workflows
from latentflow.errors import NotFoundError
from latentflow.reasons import Reason
from latentflow.requests import ImageLike
from latentflow.v1 import stage_pb2, stage_pb2_grpc
from latentflow_gateway import replicas
from latentflow_gateway.replicas import Replica
from latentflow_nodes.roles import control_net
from latentflow_nodes.server import Node
from PIL import Image
from support.paths import EXAMPLES
from support.scraping import value
from support.serving import Served, served

pytestmark = pytest.mark.asyncio
(WORKFLOW,) = load_workflows(EXAMPLES / "shapes-nets.yaml")
PICTURE = Image.new("RGB", (64, 64))
HINTS, TEXT = (identity(WORKFLOW.of_role(role)[0]) for role in (Role.CONTROL_NET, Role.TEXT_ENCODER))


def servers(running: Served) -> list[Node]:
    """Those of the ControlNet."""
    return [node for node in running.nodes if node.context.settings.role == "ControlNet"]


def count(node: Node, metric: str, **labels: str) -> float:
    return value(f"127.0.0.1:{node.metrics_port}", metric, **labels)


async def generate(client: AsyncClient, name: str) -> bytes:
    made = await client.generate("a red star", seed=3, steps=2, control_images={name: PICTURE}, timeout=120)
    return made.image.tobytes()


async def open_by_another(replica: Replica, *, text: Replica) -> None:
    """A request of another gateway for the net `layout`."""
    encoded = await stage_pb2_grpc.StageStub(text.channel).Encode(stage_pb2.EncodeRequest(prompt="a star"), timeout=60)
    opening = stage_pb2.ResidualsOpen(
        conditioning=encoded.conditioning,
        half=stage_pb2.GUIDANCE_HALF_POSITIVE,
        image=requests.encoded(PICTURE, what="It"),
        width=64,
        height=64,
        net="layout",
    )
    call = stage_pb2_grpc.StageStub(replica.channel).Residuals([stage_pb2.ResidualsRequest(open=opening)], timeout=60)
    assert (await call.read()).opened


async def test_a_request_selects_a_net_by_model_and_name(tmp_path: Path) -> None:
    async with served(tmp_path, workflow=WORKFLOW) as running, AsyncClient(running.gateway.address) as client:
        assert len({await generate(client, name) for name in ("hints", "hints/layout")}) == 2
        described = await client.describe()
        assert [model.nets for model in described.models if model.role == "ControlNet"] == [("layout",)]
        both: dict[str, ControlImage | ImageLike] = {
            "hints": PICTURE,
            "hints/layout": ControlImage(image=PICTURE, scale=0.5),
        }
        made = await client.generate("a red star", seed=3, steps=2, control_images=both, timeout=120)
        request = requests.build("a red star", control_images=both)
        recipe = pngmeta.recipe(request, made, made.ready[0])
        assert recipe.control_settings == {"hints": (1.0, 0.0, 1.0), "hints/layout": (0.5, 0.0, 1.0)}


async def test_an_unknown_net_is_refused_before_any_model_runs(tmp_path: Path) -> None:
    async with served(tmp_path, workflow=WORKFLOW) as running, AsyncClient(running.gateway.address) as client:
        with pytest.raises(NotFoundError) as caught:
            await generate(client, "hints/depth")
        assert caught.value.message == "ControlNet 'hints' has no net 'depth'; it has layout."
        assert caught.value.reason == Reason.UNKNOWN_MODEL
        assert count(running.node("TextEncoder"), "latentflow_requests_started_total", call="Encode") == 0


async def test_requests_for_two_nets_in_turn_leave_each_on_a_replica_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_net, "free_bytes", lambda _: 0)
    async with (
        served(tmp_path, workflow=WORKFLOW, control_nets=2) as running,
        AsyncClient(running.gateway.address) as client,
    ):
        for name in ("hints", "hints/layout") * 3:
            await generate(client, name)
        assert sum(count(node, "latentflow_net_evictions_total") for node in servers(running)) == 1


async def test_a_request_goes_to_the_replica_that_reports_its_net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_net, "free_bytes", lambda _: 0)
    monkeypatch.setattr(replicas, "_REREAD_SECONDS", 0.05)
    async with (
        served(tmp_path, workflow=WORKFLOW, control_nets=2) as running,
        AsyncClient(running.gateway.address) as client,
    ):
        known = running.gateway.replicas
        async with asyncio.timeout(60):
            while not (await client.describe()).ready or len(known.ready(HINTS)) < 2:
                pass
        last = known.ready(HINTS)[-1]
        await open_by_another(last, text=known.ready(TEXT)[0])
        async with asyncio.timeout(60):
            while last.nets != {"layout"}:
                await client.describe()
        await generate(client, "hints/layout")
        loads = {node.address: count(node, "latentflow_loads_total", kind="net") for node in servers(running)}
        assert loads == {one.address: float(one is last) for one in known.ready(HINTS)}

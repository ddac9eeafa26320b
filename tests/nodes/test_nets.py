"""A ControlNet server with several nets equals plain diffusers, whichever of them are on its device."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from latentflow.api.types import Net, Source
from latentflow.errors import FailedPreconditionError, LatentflowError, NotFoundError
from latentflow.internal import images
from latentflow.internal.status import error_from
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2
from latentflow_nodes.roles import control_net
from latentflow_nodes.tensors import codec
from PIL import Image
from support.packs import MODELS, SHAPES, tiny_v_prediction
from support.reference import reference
from support.stack import SECONDS, Request, Stack, png, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
LATENTS = 1e-4


def net(name: str, uri: str = "shapes", subfolder: str | None = "controlnet-layout") -> Net:
    return Net(name=name, source=Source(uri=uri, subfolder=subfolder))


@contextlib.asynccontextmanager
async def with_nets(
    *nets: Net, root: Path = MODELS, denoisers: tuple[str, ...] = (), **own: Any
) -> AsyncIterator[Stack]:
    """The shapes workflow, whose ControlNet `edges` has further nets."""
    async with started(
        root,
        "shapes",
        controls={"edges": "controlnet-edges"},
        denoisers=denoisers,
        own={"edges": {"nets": nets} | own},
    ) as stack:
        yield stack


async def assert_equal(stack: Stack, *requests: Request) -> None:
    """Generates the requests' images concurrently."""
    expected = [reference(SHAPES, request)[0] for request in requests]
    made = await asyncio.gather(*(stack.generate(request) for request in requests))
    for (latents, _), expected_latents in zip(made, expected, strict=True):
        assert (latents - expected_latents).abs().max().item() <= LATENTS


def value(stack: Stack, metric: str) -> float:
    labels = {"model": "edges", "role": "ControlNet"}
    return stack.nodes["edges"].context.metrics.registry.get_sample_value(metric, labels) or 0.0


def watching(stack: Stack) -> Any:
    stub = control_pb2_grpc.ControlStub(stack.channel("edges"))
    return stub.WatchLoad(control_pb2.WatchLoadRequest(), timeout=SECONDS)


async def on_device(stack: Stack) -> set[str]:
    call = watching(stack)
    names = set((await call.read()).nets)
    call.cancel()
    return names


async def refused(call: Any) -> LatentflowError:
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    return error_from(caught.value)


async def opening(stack: Stack, name: str) -> stage_pb2.ResidualsOpen:
    return stage_pb2.ResidualsOpen(
        conditioning=(await stack.encode(Request())).conditioning,
        half=stage_pb2.GUIDANCE_HALF_BOTH,
        image=images.png(png(Image.new("RGB", (64, 64)))),
        width=64,
        height=64,
        net=name,
    )


async def test_every_net_equals_diffusers_and_all_stay_on_a_device_with_room(
    edge_image: Image.Image, layout_image: Image.Image
) -> None:
    async with with_nets(net("layout")) as stack:
        assert await on_device(stack) == {"", "layout"}
        edges, layout = ("edges", edge_image, 0.7), ("edges/layout", layout_image, 0.9)
        await assert_equal(
            stack,
            Request(seed=1, controls=[edges]),
            Request(seed=2, controls=[layout]),
            Request(seed=3, controls=[edges, layout], guidance_scale=1.0),
        )
        assert value(stack, "latentflow_net_evictions_total") == 0


async def test_nets_that_take_turns_on_a_small_device_equal_diffusers(
    edge_image: Image.Image, layout_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_net, "free_bytes", lambda _: 0)
    async with with_nets(net("layout"), net("edges", subfolder="controlnet-edges")) as stack:
        edges, layout = ("edges", edge_image, 0.7), ("edges/layout", layout_image, 0.9)
        again = ("edges/edges", edge_image, 0.7)
        for controls in ([edges], [layout], [edges, layout]):
            await assert_equal(stack, Request(controls=controls))
        await assert_equal(
            stack,
            Request(seed=1, controls=[edges]),
            Request(seed=2, controls=[layout], guess_mode=True),
            Request(seed=3, controls=[layout, again]),
        )
        assert value(stack, "latentflow_nets_resident") == 1
        assert value(stack, "latentflow_net_evictions_total") > 8
        assert len(await on_device(stack)) == 1


async def test_nets_with_a_guidance_peer_equal_diffusers(edge_image: Image.Image, layout_image: Image.Image) -> None:
    async with with_nets(net("layout"), denoisers=("peer",)) as stack:
        request = Request(steps=12, controls=[("edges", edge_image, 0.7), ("edges/layout", layout_image, 0.9)])
        started_with_peer = await stack.denoise_open(request)
        started_with_peer.guidance_peer.CopyFrom(stack.peer("peer"))
        events = [event async for event in stack.denoising(started_with_peer)]
        assert stack.passes("peer") > 1
        latents = await stack.peers.fetch(events[-1].result.latents, name="latents")
        assert (latents - reference(SHAPES, request)[0]).abs().max().item() <= LATENTS


async def test_calls_of_several_requests_share_passes_per_net(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    async with with_nets(net("layout"), compute_lock=lock) as stack:
        calls = []
        for name in ("", "layout", "", "layout"):
            call = stack.stage("edges").Residuals(timeout=SECONDS)
            await call.write(stage_pb2.ResidualsRequest(open=await opening(stack, name)))
            assert (await call.read()).opened
            calls.append(call)
        before = stack.passes("edges")
        latents = codec.inline(torch.zeros(2, 4, 8, 8))
        with lock.open("rb") as held:
            # As another server that computes.
            fcntl.flock(held, fcntl.LOCK_EX)
            for call in calls:
                step = stage_pb2.ResidualsStep(timestep=1, sample=latents, scale=1)
                await call.write(stage_pb2.ResidualsRequest(step=step))
            load = watching(stack)
            while (await load.read()).queued < len(calls):
                pass
        for call in calls:
            assert (await call.read()).forward_ns > 0
            call.cancel()
        # A pass is recorded after its results have been sent.
        while (state := await load.read()).running or state.queued:
            pass
        load.cancel()
        assert stack.passes("edges") - before == 2


async def test_a_net_that_cannot_be_served_is_described_and_harms_no_other(
    tmp_path: Path, edge_image: Image.Image
) -> None:
    shutil.copytree(SHAPES, tmp_path / "shapes")
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copytree(SHAPES / "controlnet-layout", tmp_path / "cut")
    (tmp_path / "cut" / weights).write_bytes((SHAPES / "controlnet-layout" / weights).read_bytes()[:1000])
    tiny = tiny_v_prediction(tmp_path / "tiny")
    small_net(tiny / "unet", tmp_path / "other")
    nets = (net("cut", "cut", None), net("other", "other", None), net("absent", "absent", None), net("layout"))
    async with with_nets(*nets, root=tmp_path) as stack:
        described = {one.name: one.problem for one in (await stack.describe("edges")).control_net.nets}
        assert [name for name, problem in described.items() if not problem] == ["", "layout"]
        assert "damaged or incomplete" in described["cut"]
        assert "another architecture" in described["other"]
        assert "no weights folder" in described["absent"]
        requests = [stage_pb2.ResidualsRequest(open=await opening(stack, "cut"))]
        error = await refused(stack.stage("edges").Residuals(requests, timeout=SECONDS))
        assert isinstance(error, FailedPreconditionError)
        assert error.message.startswith("The net 'cut' cannot be used")
        await assert_equal(stack, Request(controls=[("edges", edge_image, 0.7)]))


def small_net(unet: Path, folder: Path) -> None:
    """A ControlNet of another architecture than those of the shapes pack."""
    ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(unet)).save_pretrained(folder)


async def test_an_unknown_net_is_refused_with_the_names_of_the_others() -> None:
    async with with_nets(net("layout")) as stack:
        requests = [stage_pb2.ResidualsRequest(open=await opening(stack, "depth"))]
        error = await refused(stack.stage("edges").Residuals(requests, timeout=SECONDS))
        assert isinstance(error, NotFoundError)
        assert error.message == "This ControlNet has no net 'depth'; it has layout."


async def test_a_net_whose_files_are_gone_fails_its_requests_alone(
    tmp_path: Path, edge_image: Image.Image, layout_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SHAPES, tmp_path / "shapes")
    monkeypatch.setattr(control_net, "free_bytes", lambda _: 0)
    async with with_nets(net("layout"), root=tmp_path) as stack:
        await assert_equal(stack, Request(controls=[("edges", edge_image, 0.7)]))
        shutil.rmtree(tmp_path / "shapes/controlnet-layout")
        requests = [stage_pb2.ResidualsRequest(open=await opening(stack, "layout"))]
        error = await refused(stack.stage("edges").Residuals(requests, timeout=SECONDS))
        assert isinstance(error, FailedPreconditionError)
        assert "The net 'layout'" in error.message
        await assert_equal(stack, Request(controls=[("edges", edge_image, 0.7)]))


@pytest.mark.skipif(sys.platform != "linux", reason="files are mapped into memory on Linux only")
async def test_a_net_that_leaves_the_device_leaves_memory_while_its_request_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped() -> list[str]:
        """The nets whose weights are in the memory of this process."""
        maps = Path("/proc/self/maps").read_text()
        return [name for name in ("edges", "layout") if str(tmp_path / f"shapes/controlnet-{name}") in maps]

    shutil.copytree(SHAPES, tmp_path / "shapes")
    monkeypatch.setattr(control_net, "free_bytes", lambda _: 0)
    async with with_nets(net("layout"), root=tmp_path) as stack:
        calls = []
        for name, expected in (("", "edges"), ("layout", "layout"), ("", "edges")):
            call = stack.stage("edges").Residuals(timeout=SECONDS)
            await call.write(stage_pb2.ResidualsRequest(open=await opening(stack, name)))
            assert (await call.read()).opened
            step = stage_pb2.ResidualsStep(timestep=1, sample=codec.inline(torch.zeros(2, 4, 8, 8)), scale=1)
            await call.write(stage_pb2.ResidualsRequest(step=step))
            assert (await call.read()).forward_ns > 0
            assert mapped() == [expected]
            calls.append(call)
        for call in calls:
            call.cancel()


async def test_a_net_of_bgr_images_beside_one_of_rgb_equals_diffusers(
    tmp_path: Path, layout_image: Image.Image
) -> None:
    shutil.copytree(SHAPES, tmp_path / "shapes")
    file = tmp_path / "shapes/controlnet-layout/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"controlnet_conditioning_channel_order": "bgr"}))
    async with with_nets(net("layout"), root=tmp_path) as stack:
        request = Request(controls=[("edges/layout", layout_image, 1.0)])
        latents, _ = await stack.generate(request)
        expected, _ = reference(tmp_path / "shapes", request)
        assert (latents - expected).abs().max().item() <= LATENTS

"""Scale, steps and guess mode of ControlNets equal those of plain diffusers: latents within 1e-4."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from latentflow.errors import InvalidRequestError
from latentflow.internal import images
from latentflow.internal.status import error_from
from latentflow.v1 import stage_pb2
from PIL import Image
from support.packs import MODELS, SHAPES, tiny_distilled, tiny_sdxl
from support.reference import reference
from support.stack import SECONDS, Request, Stack, png, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
LATENTS = 1e-4


async def assert_equal(stack: Stack, root: Path, requests: Sequence[Request], *, xl: bool = False) -> None:
    """Generates the requests' images concurrently."""
    expected = [reference(root, request, xl=xl)[0] for request in requests]
    made = await asyncio.gather(*(stack.generate(request) for request in requests))
    for (latents, _), expected_latents in zip(made, expected, strict=True):
        assert (latents - expected_latents).abs().max().item() <= LATENTS


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.3, 2.0])
async def test_any_control_scale_equals_diffusers(shapes: Stack, edge_image: Image.Image, scale: float) -> None:
    await assert_equal(shapes, SHAPES, [Request(controls=[("edges", edge_image, scale)])])


# Of 5 steps: boundaries on a step, between two, and with no step inside.
@pytest.mark.parametrize("part", [(0.0, 0.6), (0.2, 1.0), (0.4, 0.8), (0.3, 0.7), (0.41, 0.59), (0.0, 0.1)])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
async def test_any_part_of_the_steps_equals_diffusers(
    shapes: Stack, edge_image: Image.Image, part: tuple[float, float], sampler: str
) -> None:
    request = Request(steps=5, sampler=sampler, controls=[("edges", edge_image, 0.9)], control_ranges={"edges": part})
    await assert_equal(shapes, SHAPES, [request])


async def test_each_controlnet_has_its_own_part_of_the_steps(
    shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    controls = [("edges", edge_image, 0.7), ("layout", layout_image, 1.1)]
    for edges, layout in (((0.0, 0.5), (0.5, 1.0)), ((0.2, 0.8), (0.0, 0.4))):
        request = Request(steps=5, controls=controls, control_ranges={"edges": edges, "layout": layout})
        await assert_equal(shapes, SHAPES, [request])


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("nets", [("edges",), ("edges", "layout")])
async def test_guess_mode_equals_diffusers(
    shapes: Stack, edge_image: Image.Image, layout_image: Image.Image, nets: tuple[str, ...], guidance_scale: float
) -> None:
    hints = {"edges": edge_image, "layout": layout_image}
    request = Request(
        prompt="",
        guidance_scale=guidance_scale,
        guess_mode=True,
        controls=[(name, hints[name], 0.8) for name in nets],
        control_ranges={"edges": (0.0, 0.75)},
    )
    await assert_equal(shapes, SHAPES, [request])


async def test_requests_in_guess_mode_share_passes_with_others(
    shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    edges, layout = ("edges", edge_image, 0.7), ("layout", layout_image, 1.2)
    requests = [
        Request(seed=1, guess_mode=True, controls=[edges]),
        Request(seed=2, controls=[edges, layout]),
        Request(seed=3, guess_mode=True, controls=[edges, layout], guidance_scale=1.0),
        Request(seed=4),
    ]
    before = shapes.passes("base")
    await assert_equal(shapes, SHAPES, requests)
    assert shapes.passes("base") - before < sum(request.steps for request in requests)


async def test_guess_mode_with_a_guidance_peer_equals_diffusers(
    edge_image: Image.Image, layout_image: Image.Image
) -> None:
    controls = {"edges": "controlnet-edges", "layout": "controlnet-layout"}
    async with started(MODELS, "shapes", controls=controls, denoisers=["peer"]) as stack:
        request = Request(
            steps=12, guess_mode=True, controls=[("edges", edge_image, 0.8), ("layout", layout_image, 0.6)]
        )
        opening = await stack.denoise_open(request)
        opening.guidance_peer.CopyFrom(stack.peer("peer"))
        events = [event async for event in stack.denoising(opening)]
        assert stack.passes("peer") > 1
        latents = await stack.peers.fetch(events[-1].result.latents, name="latents")
        assert (latents - reference(SHAPES, request)[0]).abs().max().item() <= LATENTS


async def test_guess_mode_of_sdxl_equals_diffusers(tmp_path: Path, edge_image: Image.Image) -> None:
    tiny_sdxl(tmp_path / "tiny")
    control = ("control", edge_image.resize((32, 32)), 0.8)
    async with started(tmp_path, "tiny", controls={"control": "controlnet"}) as stack:
        requests = [Request(side=32, guess_mode=True, controls=[control]), Request(side=32, seed=2, controls=[control])]
        await assert_equal(stack, tmp_path / "tiny", requests, xl=True)


async def test_guess_mode_of_a_distilled_model_equals_diffusers(tmp_path: Path, edge_image: Image.Image) -> None:
    tiny_distilled(tmp_path / "tiny")
    control = ("control", edge_image.resize((32, 32)), 0.8)
    async with started(tmp_path, "tiny", controls={"control": "controlnet"}) as stack:
        await assert_equal(stack, tmp_path / "tiny", [Request(side=32, guess_mode=True, controls=[control])])


async def test_guess_mode_is_refused_for_rows_of_the_negative_half(shapes: Stack) -> None:
    opening = stage_pb2.ResidualsOpen(
        conditioning=(await shapes.encode(Request())).conditioning,
        half=stage_pb2.GUIDANCE_HALF_BOTH,
        guess_mode=True,
        image=images.png(png(Image.new("RGB", (64, 64)))),
        width=64,
        height=64,
    )
    call = shapes.stage("edges").Residuals([stage_pb2.ResidualsRequest(open=opening)], timeout=SECONDS)
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    error = error_from(caught.value)
    assert isinstance(error, InvalidRequestError)
    assert "positive half only" in error.message

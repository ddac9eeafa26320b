"""Exact modes equal the plain diffusers pipeline: latents within 1e-4, images within 1/255."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latentflow_nodes.engine.samplers import SAMPLERS
from latentflow_nodes.families.unet import UNetFamily
from PIL import Image
from support.packs import SHAPES, tiny_distilled, tiny_sdxl, tiny_v_prediction
from support.products import combinations
from support.reference import reference
from support.stack import Request, Stack, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
LATENTS = 1e-4
PIXELS = 1


async def assert_equal(stack: Stack, root: Path, *requests: Request, xl: bool = False) -> None:
    """Generates the requests' images concurrently."""
    expected = [reference(root, request, xl=xl) for request in requests]
    made = await asyncio.gather(*(stack.generate(request) for request in requests))
    for (latents, image), (expected_latents, expected_image) in zip(made, expected, strict=True):
        assert (latents - expected_latents).abs().max().item() <= LATENTS
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected_image, dtype=int))
        assert difference.max() <= PIXELS


async def test_a_prompt_alone_makes_diffusers_image(shapes: Stack) -> None:
    await assert_equal(shapes, SHAPES, Request(steps=20))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5, 7.5])
async def test_any_guidance_scale_equals_diffusers(shapes: Stack, guidance_scale: float) -> None:
    await assert_equal(shapes, SHAPES, Request(guidance_scale=guidance_scale))


async def test_a_negative_prompt_equals_diffusers(shapes: Stack) -> None:
    await assert_equal(shapes, SHAPES, Request(negative_prompt="a small blue star, black background"))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
async def test_every_sampler_equals_diffusers(shapes: Stack, sampler: str) -> None:
    await assert_equal(shapes, SHAPES, Request(sampler=sampler, steps=8))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
async def test_the_edges_controlnet_equals_diffusers(
    shapes: Stack, edge_image: Image.Image, guidance_scale: float
) -> None:
    await assert_equal(shapes, SHAPES, Request(controls=[("edges", edge_image, 0.8)], guidance_scale=guidance_scale))


async def test_the_layout_controlnet_equals_diffusers(shapes: Stack, layout_image: Image.Image) -> None:
    await assert_equal(shapes, SHAPES, Request(controls=[("layout", layout_image, 1.0)]))


async def test_a_control_image_is_embedded_once_for_all_steps(
    shapes: Stack, edge_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    embed = UNetFamily.embed_control_image

    def counted(self: UNetFamily, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        rows.append(len(image))
        return embed(self, network, image)

    monkeypatch.setattr(UNetFamily, "embed_control_image", counted)
    await assert_equal(shapes, SHAPES, Request(controls=[("edges", edge_image, 0.8)]))
    assert rows == [1]


@pytest.mark.parametrize("mode", ["RGB", "L"])
async def test_a_controlnet_of_bgr_images_equals_diffusers(
    tmp_path: Path, layout_image: Image.Image, mode: str
) -> None:
    shutil.copytree(SHAPES, tmp_path / "m")
    file = tmp_path / "m/controlnet-layout/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"controlnet_conditioning_channel_order": "bgr"}))
    async with started(tmp_path, "m", controls={"layout": "controlnet-layout"}) as stack:
        await assert_equal(stack, tmp_path / "m", Request(controls=[("layout", layout_image.convert(mode), 1.0)]))


async def test_two_controlnets_equal_diffusers(
    shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    await assert_equal(shapes, SHAPES, Request(controls=[("edges", edge_image, 0.7), ("layout", layout_image, 0.9)]))


@pytest.mark.parametrize("lora", ["outline", "pastel", "neon"])
async def test_each_lora_equals_diffusers(shapes: Stack, lora: str) -> None:
    await assert_equal(shapes, SHAPES, Request(loras=[(lora, 0.8)]))


async def test_two_loras_equal_diffusers(shapes: Stack) -> None:
    await assert_equal(shapes, SHAPES, Request(loras=[("outline", 0.6), ("neon", 0.5)]))


async def test_controlnets_and_loras_together_equal_diffusers(
    shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    controls = [("edges", edge_image, 0.7), ("layout", layout_image, 0.9)]
    await assert_equal(shapes, SHAPES, Request(controls=controls, loras=[("pastel", 0.9), ("neon", 0.4)]))


@pytest.mark.parametrize(
    ("sampler", "guidance_scale", "controls", "loras"),
    combinations(
        sorted(SAMPLERS), [1.0, 5.0], [(), ("edges",), ("edges", "layout")], [(), ("outline",), ("pastel", "neon")]
    ),
)
async def test_every_combination_of_features_is_diffusers_own(
    shapes: Stack,
    edge_image: Image.Image,
    layout_image: Image.Image,
    sampler: str,
    guidance_scale: float,
    controls: tuple[str, ...],
    loras: tuple[str, ...],
) -> None:
    hints = {"edges": edge_image, "layout": layout_image}
    request = Request(
        sampler=sampler,
        guidance_scale=guidance_scale,
        controls=[(name, hints[name], 0.8) for name in controls],
        loras=[(name, 0.7) for name in loras],
    )
    await assert_equal(shapes, SHAPES, request)


async def test_concurrent_requests_that_differ_share_passes_and_equal_diffusers(
    shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    edges, layout = ("edges", edge_image, 0.7), ("layout", layout_image, 1.2)
    requests = [
        Request(seed=1, steps=6),
        Request(seed=2, steps=5, guidance_scale=1.0, sampler="euler_ancestral"),
        Request(seed=3, steps=6, controls=[edges], negative_prompt="a star"),
        Request(seed=4, steps=4, guidance_scale=1.0, controls=[edges, layout], sampler="dpmpp_2m"),
    ]
    before = shapes.passes("base")
    await assert_equal(shapes, SHAPES, *requests)
    assert shapes.passes("base") - before < sum(request.steps for request in requests)


async def test_concurrent_sdxl_requests_equal_diffusers(tmp_path: Path, edge_image: Image.Image) -> None:
    tiny_sdxl(tmp_path / "tiny")
    control = ("control", edge_image.resize((32, 32)), 0.8)
    requests = [
        Request(side=32, seed=1),
        Request(side=32, seed=2, guidance_scale=1.0),
        Request(side=32, seed=3, controls=[control], negative_prompt="a star"),
    ]
    async with started(tmp_path, "tiny", controls={"control": "controlnet"}) as stack:
        await assert_equal(stack, tmp_path / "tiny", *requests, xl=True)


async def test_the_plain_model_is_restored_bit_for_bit_after_a_lora(shapes: Stack) -> None:
    before, _ = await shapes.generate(Request())
    await shapes.generate(Request(loras=[("outline", 1.0), ("pastel", 0.3), ("neon", -0.5)]))
    after, _ = await shapes.generate(Request())
    assert torch.equal(before, after)


async def test_a_v_prediction_model_equals_diffusers(tmp_path: Path) -> None:
    tiny_v_prediction(tmp_path / "tiny")
    async with started(tmp_path, "tiny") as stack:
        await assert_equal(stack, tmp_path / "tiny", Request(side=32))


@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(1.0, None), (5.0, None), (5.0, "a blue star")])
async def test_sdxl_equals_diffusers(tmp_path: Path, guidance_scale: float, negative_prompt: str | None) -> None:
    tiny_sdxl(tmp_path / "tiny")
    async with started(tmp_path, "tiny") as stack:
        request = Request(side=32, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
        await assert_equal(stack, tmp_path / "tiny", request, xl=True)


async def test_an_sdxl_controlnet_equals_diffusers(tmp_path: Path, edge_image: Image.Image) -> None:
    tiny_sdxl(tmp_path / "tiny")
    async with started(tmp_path, "tiny", controls={"control": "controlnet"}) as stack:
        request = Request(side=32, controls=[("control", edge_image.resize((32, 32)), 0.8)])
        await assert_equal(stack, tmp_path / "tiny", request, xl=True)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
async def test_a_guidance_distilled_model_equals_diffusers(
    tmp_path: Path, edge_image: Image.Image, guidance_scale: float
) -> None:
    tiny_distilled(tmp_path / "tiny")
    async with started(tmp_path, "tiny", controls={"control": "controlnet"}) as stack:
        request = Request(side=32, guidance_scale=guidance_scale)
        await assert_equal(stack, tmp_path / "tiny", request)
        request.controls = [("control", edge_image.resize((32, 32)), 0.8)]
        await assert_equal(stack, tmp_path / "tiny", request)

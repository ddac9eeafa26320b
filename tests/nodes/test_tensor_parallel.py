"""A denoiser whose weights are divided among ranks makes the results of the whole network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
import torch
from latentflow.api.types import Engine
from latentflow.errors import UnimplementedError
from latentflow.internal.status import error_from
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2
from latentflow_nodes.server import serve
from latentflow_nodes.settings import NodeSettings
from PIL import Image
from support import single_files
from support.packs import MODELS, SHAPES, tiny_sdxl
from support.stack import SECONDS, Request, Stack, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
LATENTS = 1e-4
STEPS = 5


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def divided(shapes: Stack) -> AsyncIterator[Stack]:
    """The shapes workflow with a denoiser of two ranks in place of the whole one."""
    async with replaced(shapes, MODELS, "shapes", ranks=2) as stack:
        yield stack


def replaced(stack: Stack, root: Path, uri: str, *, ranks: int) -> _Replaced:
    return _Replaced(stack, root, uri, ranks)


class _Replaced:
    """The servers of a stack, with a divided denoiser over a pack."""

    def __init__(self, stack: Stack, root: Path, uri: str, ranks: int) -> None:
        self._stack = stack
        self._server = serve(
            NodeSettings(
                role="Denoiser", uri=uri, model_root=root, identity="base", engine=Engine(threads=1), tensor=ranks
            )
        )

    async def __aenter__(self) -> Stack:
        return Stack(self._stack.nodes | {"base": await self._server.__aenter__()}, self._stack.peers)

    async def __aexit__(self, *error: object) -> None:
        await self._server.__aexit__(*error)  # type: ignore[arg-type]


async def latents(stack: Stack, request: Request) -> torch.Tensor:
    return await stack.peers.fetch((await stack.denoise(request)).latents, name="latents")


async def assert_equal(divided: Stack, whole: Stack, *requests: Request) -> None:
    """Makes the requests concurrently."""
    expected = [await latents(whole, one) for one in requests]
    for found, one in zip(await asyncio.gather(*(latents(divided, one) for one in requests)), expected, strict=True):
        assert (found - one).abs().max().item() <= LATENTS


@pytest.mark.parametrize(
    ("sampler", "guidance_scale"), [("ddim", 1.0), ("ddim", 5.0), ("euler_ancestral", 5.0), ("dpmpp_2m", 1.0)]
)
async def test_a_divided_network_equals_the_whole_one(
    divided: Stack, shapes: Stack, sampler: str, guidance_scale: float
) -> None:
    await assert_equal(divided, shapes, Request(guidance_scale=guidance_scale, sampler=sampler, steps=12))


async def test_it_equals_the_whole_one_at_a_size_that_is_no_multiple_of_its_scale(
    divided: Stack, shapes: Stack
) -> None:
    await assert_equal(divided, shapes, Request(side=72))


@pytest.mark.parametrize("names", [("edges",), ("edges", "layout")])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
async def test_residuals_of_controlnets_are_added_on_all_ranks(
    divided: Stack,
    shapes: Stack,
    edge_image: Image.Image,
    layout_image: Image.Image,
    names: tuple[str, ...],
    guidance_scale: float,
) -> None:
    hints = {"edges": edge_image, "layout": layout_image}
    controls = [(name, hints[name], 0.8) for name in names]
    await assert_equal(divided, shapes, Request(controls=controls, guidance_scale=guidance_scale))


@pytest.mark.parametrize(
    "loras", [[("outline", 0.8)], [("pastel", 0.9)], [("neon", 1.2)], [("neon", 0.4), ("outline", -0.5)]]
)
async def test_loras_are_merged_into_the_parts_and_undone_bit_for_bit(
    divided: Stack, shapes: Stack, loras: list[tuple[str, float]]
) -> None:
    before = await latents(divided, Request())
    await assert_equal(divided, shapes, Request(loras=loras))
    assert torch.equal(await latents(divided, Request()), before)


async def test_concurrent_requests_with_different_loras_each_get_their_own(divided: Stack, shapes: Stack) -> None:
    loras = [[("outline", 0.8)], [("neon", 0.5), ("pastel", -0.4)], []]
    await assert_equal(divided, shapes, *(Request(seed=seed, loras=its) for seed, its in enumerate(loras)))


async def test_concurrent_requests_that_differ_share_the_passes_of_all_ranks(
    divided: Stack, shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    edges, layout = ("edges", edge_image, 0.7), ("layout", layout_image, 1.2)
    requests = [
        Request(seed=1, steps=6),
        Request(seed=2, steps=5, guidance_scale=1.0, sampler="euler_ancestral"),
        Request(seed=3, steps=6, controls=[edges], negative_prompt="a star"),
        Request(seed=4, steps=4, guidance_scale=1.0, controls=[edges, layout], sampler="dpmpp_2m"),
    ]
    before = divided.passes("base")
    await assert_equal(divided, shapes, *requests)
    assert divided.passes("base") - before < sum(request.steps for request in requests)


async def test_a_request_resumes_between_a_divided_and_a_whole_denoiser(divided: Stack, shapes: Stack) -> None:
    request = Request(steps=STEPS, sampler="euler_ancestral")
    opening = await divided.denoise_open(request)
    opening.checkpoint_interval = 1
    states, expected = await checkpoints(divided, opening)
    assert len(states) == STEPS - 1
    for state in states:
        opening.checkpoint = state
        assert torch.equal((await checkpoints(divided, opening))[1], expected)
        assert ((await checkpoints(shapes, opening))[1] - expected).abs().max().item() <= LATENTS


async def checkpoints(stack: Stack, opening: stage_pb2.DenoiseOpen) -> tuple[list[bytes], torch.Tensor]:
    """A checkpoint after every step, and the final latents."""
    states: list[bytes] = []
    async for event in stack.denoising(opening):
        if event.WhichOneof("event") == "result":
            return states, await stack.peers.fetch(event.result.latents, name="latents")
        if event.progress.HasField("checkpoint"):
            states.append(event.progress.checkpoint.state)
    raise AssertionError("no result")


@pytest.mark.exhaustive
async def test_a_network_of_four_ranks_equals_the_whole_one(
    shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    requests = [
        Request(seed=1),
        Request(seed=2, controls=[("edges", edge_image, 0.7), ("layout", layout_image, 0.9)], guidance_scale=1.0),
        Request(seed=3, loras=[("outline", 0.8), ("neon", -0.3)]),
    ]
    async with replaced(shapes, MODELS, "shapes", ranks=4) as divided:
        await assert_equal(divided, shapes, *requests)
        assert [one.kind for one in (await divided.describe("base")).devices] == ["cpu"] * 4


async def test_a_divided_sdxl_network_with_a_controlnet_equals_the_whole_one(
    tmp_path: Path, edge_image: Image.Image
) -> None:
    tiny_sdxl(tmp_path / "tiny")
    control = ("control", edge_image.resize((32, 32)), 0.8)
    async with (
        started(tmp_path, "tiny", controls={"control": "controlnet"}) as whole,
        replaced(whole, tmp_path, "tiny", ranks=2) as divided,
    ):
        await assert_equal(divided, whole, Request(side=32), Request(side=32, controls=[control], guidance_scale=1.0))


async def test_the_network_of_a_single_file_is_divided_too(tmp_path: Path, shapes: Stack) -> None:
    file = single_files.written(SHAPES, tmp_path / "one")
    async with replaced(shapes, tmp_path, f"one/{file.name}", ranks=2) as divided:
        await assert_equal(divided, shapes, Request())


async def test_a_divided_denoiser_refuses_to_sleep_and_continues_to_serve(divided: Stack) -> None:
    control = control_pb2_grpc.ControlStub(divided.channel("base"))
    with pytest.raises(grpc.RpcError) as caught:
        await control.Sleep(control_pb2.SleepRequest(epoch=1), timeout=SECONDS)
    assert isinstance(error_from(caught.value), UnimplementedError)
    assert (await divided.denoise(Request(steps=1))).HasField("latents")

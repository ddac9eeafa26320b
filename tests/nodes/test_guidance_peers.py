"""Two replicas of a denoiser compute the guidance halves of one request, as plain diffusers computes them in one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import torch
from latentflow.api.types import Engine
from latentflow.errors import FailedPreconditionError, InvalidRequestError, LatentflowError
from latentflow.internal.status import error_from
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2, stage_pb2_grpc
from latentflow_nodes.engine.samplers import SAMPLERS
from latentflow_nodes.server import serve
from latentflow_nodes.settings import NodeSettings
from latentflow_nodes.tensors import codec
from PIL import Image
from support.packs import MODELS, SHAPES, tiny_distilled, tiny_sdxl
from support.products import combinations
from support.reference import reference
from support.scraping import value
from support.stack import SECONDS, Request, Stack, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
LATENTS = 1e-4
STEPS = 12


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair() -> AsyncIterator[Stack]:
    """The shapes workflow with both ControlNets, the LoRA store and two replicas of the denoiser: base and peer."""
    controls = {"edges": "controlnet-edges", "layout": "controlnet-layout"}
    async with started(MODELS, "shapes", controls=controls, loras="loras", denoisers=["peer"]) as stack:
        yield stack


class Events:
    """What a Denoise call has sent: the addresses of the guidance peers, the reasons of their losses, the result."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.reasons: list[str] = []
        self.result = stage_pb2.DenoiseResult()

    def add(self, event: Any) -> None:
        if isinstance(event, stage_pb2.PredictNoiseResponse):
            return
        if event.WhichOneof("event") == "guidance":
            self.peers.append(event.guidance.address)
            self.reasons.append(event.guidance.reason)
        elif event.WhichOneof("event") == "result":
            self.result = event.result

    async def rest(self, call: Any) -> None:
        while (event := await call.read()) is not grpc.aio.EOF:
            self.add(event)

    async def until_change(self, call: Any) -> None:
        before = len(self.peers)
        while len(self.peers) == before:
            self.add(await call.read())


def steps_of(stack: Stack, name: str) -> int:
    """The forward passes of a server."""
    return round(value(f"127.0.0.1:{stack.nodes[name].metrics_port}", "latentflow_step_seconds_count"))


def lost_peers(stack: Stack, reason: str) -> float:
    """Guidance peers that base has lost."""
    return value(f"127.0.0.1:{stack.nodes['base'].metrics_port}", "latentflow_guidance_peers_lost_total", reason=reason)


async def with_peer(
    stack: Stack, request: Request, peer: stage_pb2.Peer | None = None, *, seconds: float = SECONDS
) -> tuple[Any, Events]:
    """A Denoise call with a guidance peer."""
    opening = await stack.denoise_open(request)
    opening.guidance_peer.CopyFrom(stack.peer("peer") if peer is None else peer)
    call = stack.stage("base").Denoise(timeout=seconds)
    await call.write(stage_pb2.DenoiseRequest(open=opening))
    return call, Events()


async def assert_equal(stack: Stack, root: Path, request: Request, events: Events, *, xl: bool = False) -> None:
    expected, _ = reference(root, request, xl=xl)
    latents = await stack.peers.fetch(events.result.latents, name="latents")
    assert (latents - expected).abs().max().item() <= LATENTS


async def refused(call: Any) -> LatentflowError:
    with pytest.raises(grpc.RpcError) as caught:
        await Events().rest(call)
    return error_from(caught.value)


@pytest.mark.parametrize(
    ("sampler", "controls", "loras"),
    combinations(sorted(SAMPLERS), [(), ("edges",), ("edges", "layout")], [(), ("outline",), ("pastel", "neon")]),
)
async def test_two_replicas_make_diffusers_image(
    pair: Stack,
    edge_image: Image.Image,
    layout_image: Image.Image,
    sampler: str,
    controls: tuple[str, ...],
    loras: tuple[str, ...],
) -> None:
    hints = {"edges": edge_image, "layout": layout_image}
    request = Request(
        sampler=sampler,
        steps=STEPS,
        controls=[(name, hints[name], 0.8) for name in controls],
        loras=[(name, 0.7) for name in loras],
    )
    before = steps_of(pair, "peer")
    call, events = await with_peer(pair, request)
    await events.rest(call)
    assert (events.peers, events.reasons) == ([pair.nodes["peer"].address], [""])
    assert STEPS // 2 <= steps_of(pair, "peer") - before <= STEPS
    await assert_equal(pair, SHAPES, request, events)


async def test_two_replicas_of_sdxl_make_diffusers_image(tmp_path: Path, edge_image: Image.Image) -> None:
    tiny_sdxl(tmp_path / "tiny")
    async with started(tmp_path, "tiny", controls={"control": "controlnet"}, denoisers=["peer"]) as stack:
        controls = [("control", edge_image.resize((32, 32)), 0.8)]
        request = Request(side=32, steps=STEPS, negative_prompt="a blue star", controls=controls)
        before = steps_of(stack, "peer")
        call, events = await with_peer(stack, request)
        await events.rest(call)
        assert steps_of(stack, "peer") > before
        await assert_equal(stack, tmp_path / "tiny", request, events, xl=True)


async def test_a_peer_is_given_and_taken_back_while_the_request_runs(pair: Stack) -> None:
    request = Request(steps=200)
    call = pair.stage("base").Denoise(timeout=SECONDS)
    await call.write(stage_pb2.DenoiseRequest(open=await pair.denoise_open(request)))
    events = Events()
    for peer in [pair.peer("peer"), stage_pb2.Peer()] * 2:
        await call.write(stage_pb2.DenoiseRequest(guidance=stage_pb2.DenoiseGuidance(peer=peer)))
        await events.until_change(call)
    await events.rest(call)
    assert events.peers == [pair.nodes["peer"].address, ""] * 2
    assert events.reasons == [""] * 4
    await assert_equal(pair, SHAPES, request, events)


async def test_a_request_whose_peer_stops_continues_alone(pair: Stack) -> None:
    request = Request(steps=200)
    settings = NodeSettings(role="Denoiser", uri="shapes", model_root=MODELS, engine=Engine(threads=1))
    async with serve(settings) as other:
        call, events = await with_peer(pair, request, stage_pb2.Peer(address=other.address))
        await events.until_change(call)
        assert events.peers == [other.address]
    await events.rest(call)
    assert events.peers == [other.address, ""]
    assert events.reasons[1] == Reason.PEER_UNAVAILABLE
    await assert_equal(pair, SHAPES, request, events)


async def test_a_request_whose_peer_cannot_be_reached_runs_alone(pair: Stack) -> None:
    request = Request(steps=100)
    call, events = await with_peer(pair, request, stage_pb2.Peer(address="127.0.0.1:9"))
    await events.rest(call)
    assert events.peers == [""]
    assert events.reasons == [Reason.PEER_UNAVAILABLE]
    await assert_equal(pair, SHAPES, request, events)


async def test_a_peer_with_other_weights_is_not_used(pair: Stack, tmp_path: Path) -> None:
    tiny_sdxl(tmp_path / "tiny")
    settings = NodeSettings(role="Denoiser", uri="tiny", model_root=tmp_path, engine=Engine(threads=1))
    request = Request(steps=100)
    async with serve(settings) as other:
        call, events = await with_peer(pair, request, stage_pb2.Peer(address=other.address))
        await events.rest(call)
    assert events.reasons == [Reason.WEIGHTS_MISMATCH]
    await assert_equal(pair, SHAPES, request, events)


async def test_a_peer_that_drains_ends_its_guests_and_their_requests_continue(pair: Stack) -> None:
    request = Request(steps=100)
    settings = NodeSettings(role="Denoiser", uri="shapes", model_root=MODELS, engine=Engine(threads=1))
    async with serve(settings) as other:
        call, events = await with_peer(pair, request, stage_pb2.Peer(address=other.address))
        await events.until_change(call)
        await other.drain(SECONDS)
        assert pair.nodes["base"].context.load.state().running == 1
        await events.rest(call)
    assert events.peers == [other.address, ""]
    await assert_equal(pair, SHAPES, request, events)


async def test_a_peer_that_falls_asleep_ends_its_guests_and_their_requests_continue(pair: Stack) -> None:
    request = Request(steps=100)
    settings = NodeSettings(role="Denoiser", uri="shapes", model_root=MODELS, engine=Engine(threads=1))
    async with serve(settings) as other:
        call, events = await with_peer(pair, request, stage_pb2.Peer(address=other.address))
        await events.until_change(call)
        control = control_pb2_grpc.ControlStub(pair.peers.channel(other.address))
        await control.Sleep(control_pb2.SleepRequest(epoch=1), timeout=SECONDS)
        await events.rest(call)
    assert events.peers == [other.address, ""]
    assert events.reasons[1] == Reason.PEER_UNAVAILABLE
    await assert_equal(pair, SHAPES, request, events)


class Silent(stage_pb2_grpc.StageServicer):
    """A denoiser that accepts guests and never answers a step.

    Attributes:
        seconds_left: Until the deadline of the last call.
    """

    seconds_left: float | None = None

    async def PredictNoise(  # noqa: N802
        self, requests: Any, context: Any
    ) -> AsyncIterator[stage_pb2.PredictNoiseResponse]:
        self.seconds_left = context.time_remaining()
        yield stage_pb2.PredictNoiseResponse(opened=True)
        await asyncio.Event().wait()


async def test_a_request_whose_peer_never_answers_continues_alone(pair: Stack) -> None:
    silent, server = Silent(), grpc.aio.server()
    before = lost_peers(pair, Reason.PEER_UNAVAILABLE)
    stage_pb2_grpc.add_StageServicer_to_server(silent, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        call, events = await with_peer(pair, Request(steps=24), stage_pb2.Peer(address=address))
        await events.rest(call)
    finally:
        await server.stop(None)
    assert events.peers == [address, ""]
    assert events.reasons == ["", Reason.PEER_UNAVAILABLE]
    assert lost_peers(pair, Reason.PEER_UNAVAILABLE) == before + 1
    # The stream has the deadline of the request.
    assert silent.seconds_left is not None
    assert silent.seconds_left < 2 * SECONDS
    await assert_equal(pair, SHAPES, Request(steps=24), events)


async def test_requests_with_and_without_a_peer_share_both_replicas(pair: Stack) -> None:
    requests = [Request(seed=seed, steps=40, loras=[("neon", 0.7)] * (seed % 2)) for seed in range(4)]
    plain = [pair.denoising(await pair.denoise_open(request)) for request in requests[:2]]
    calls = [(call, Events()) for call in plain]
    calls += [await with_peer(pair, request) for request in requests[2:]]
    await asyncio.gather(*(events.rest(call) for call, events in calls))
    for request, (_, events) in zip(requests, calls, strict=True):
        await assert_equal(pair, SHAPES, request, events)


@pytest.mark.parametrize("seconds", [None, 3.0], ids=["cancelled", "deadline"])
async def test_a_request_that_ends_early_leaves_its_peer(pair: Stack, seconds: float | None) -> None:
    call, events = await with_peer(pair, Request(steps=1000, side=256), seconds=seconds or SECONDS)
    await events.until_change(call)
    if seconds is None:
        call.cancel()
    else:
        assert (await refused(call)).reason == Reason.DEADLINE_EXCEEDED
    peer = pair.nodes["peer"]
    async with asyncio.timeout(SECONDS):
        async for state in peer.context.load.watch():
            if state.running == 0:
                break


async def test_a_guidance_distilled_model_has_no_peer(tmp_path: Path) -> None:
    tiny_distilled(tmp_path / "tiny")
    async with started(tmp_path, "tiny", denoisers=["peer"]) as stack:
        call, _ = await with_peer(stack, Request(side=32))
        error = await refused(call)
        assert isinstance(error, FailedPreconditionError)
        assert error.reason == Reason.GUIDANCE_EMBEDDED
        opening = stage_pb2.PredictNoiseOpen(half=stage_pb2.GUIDANCE_HALF_NEGATIVE, total=1)
        requests = [stage_pb2.PredictNoiseRequest(open=opening)]
        error = await refused(stack.stage("peer").PredictNoise(requests, timeout=SECONDS))
        assert error.reason == Reason.GUIDANCE_EMBEDDED


async def test_a_request_without_a_second_half_has_no_peer(pair: Stack) -> None:
    call, _ = await with_peer(pair, Request(guidance_scale=1.0))
    error = await refused(call)
    assert isinstance(error, InvalidRequestError)
    assert "has no negative half" in error.message


async def test_a_deterministic_request_has_no_peer(pair: Stack) -> None:
    opening = await pair.denoise_open(Request())
    opening.scheduling.deterministic = True
    opening.guidance_peer.CopyFrom(pair.peer("peer"))
    error = await refused(pair.denoising(opening))
    assert isinstance(error, InvalidRequestError)
    assert "deterministic" in error.message


async def predict_noise_open(stack: Stack, **fields: Any) -> stage_pb2.PredictNoiseOpen:
    return stage_pb2.PredictNoiseOpen(
        conditioning=(await stack.encode(Request())).conditioning,
        **({"half": stage_pb2.GUIDANCE_HALF_NEGATIVE, "width": 64, "height": 64, "total": 4} | fields),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"half": stage_pb2.GUIDANCE_HALF_BOTH}, "one guidance half"),
        ({"total": 0}, "the number of its steps"),
    ],
)
async def test_a_half_that_cannot_be_served_is_refused(pair: Stack, fields: dict[str, Any], message: str) -> None:
    requests = [stage_pb2.PredictNoiseRequest(open=await predict_noise_open(pair, **fields))]
    error = await refused(pair.stage("peer").PredictNoise(requests, timeout=SECONDS))
    assert isinstance(error, InvalidRequestError)
    assert message in error.message


STEP = stage_pb2.PredictNoiseStep(timestep=1.0, sample=codec.inline(torch.zeros(1, 4, 8, 8)))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (stage_pb2.PredictNoiseStep(step=4, sample=STEP.sample), "does not belong to a request of 4 steps"),
        (stage_pb2.PredictNoiseStep(sample=STEP.sample, adapters=[0]), "names adapter 0 of 0"),
    ],
)
async def test_a_step_that_does_not_belong_to_the_half_is_refused(
    pair: Stack, step: stage_pb2.PredictNoiseStep, message: str
) -> None:
    opening = stage_pb2.PredictNoiseRequest(open=await predict_noise_open(pair))
    requests = [opening, stage_pb2.PredictNoiseRequest(step=step)]
    error = await refused(pair.stage("peer").PredictNoise(requests, timeout=SECONDS))
    assert isinstance(error, InvalidRequestError)
    assert message in error.message


async def test_a_stream_of_halves_that_does_not_begin_with_open_is_refused(pair: Stack) -> None:
    requests = [stage_pb2.PredictNoiseRequest(step=STEP)]
    error = await refused(pair.stage("peer").PredictNoise(requests, timeout=SECONDS))
    assert isinstance(error, InvalidRequestError)
    assert "must be `open`" in error.message


@pytest.mark.parametrize("half", [stage_pb2.GUIDANCE_HALF_POSITIVE, stage_pb2.GUIDANCE_HALF_NEGATIVE])
async def test_either_half_can_be_computed_alone(pair: Stack, half: stage_pb2.GuidanceHalf) -> None:
    call = pair.stage("peer").PredictNoise(timeout=SECONDS)
    await call.write(stage_pb2.PredictNoiseRequest(open=await predict_noise_open(pair, half=half)))
    assert await call.read() == stage_pb2.PredictNoiseResponse(opened=True)
    await call.write(stage_pb2.PredictNoiseRequest(step=STEP))
    answer = await call.read()
    assert list(answer.chunk.headers[0].shape) == [1, 4, 8, 8]
    assert (answer.chunk.headers[0].name, answer.forward_ns > 0) == ("noise", True)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF

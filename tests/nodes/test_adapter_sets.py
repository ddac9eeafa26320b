"""Requests with different adapter sets share forward passes, each with its own set, and equal plain diffusers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from latentflow.api.types import Engine as EngineOptions
from latentflow.internal.metrics import NODE, Instruments
from latentflow.v1 import stage_pb2
from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.adapters.library import Library
from latentflow_nodes.adapters.shard_merger import ShardMerger
from latentflow_nodes.engine.applied_adapters import AppliedAdapters
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.forward_time import ForwardTime
from latentflow_nodes.engine.member import Control, Member
from latentflow_nodes.engine.profile import Profile
from latentflow_nodes.engine.runner import Prediction
from latentflow_nodes.engine.sample import LateAdapters
from latentflow_nodes.families.base import Residuals
from latentflow_nodes.families.splits import Plan, Shard
from PIL import Image
from support.packs import MODELS, SHAPES
from support.reference import reference
from support.stack import SECONDS, Request, Stack, started
from support.step_loop import NETWORK, Edges, Listener, Recording, engine_of, finish, sample

LATENTS = 1e-4
STEPS = 4
Set = tuple[tuple[str, float], ...]


class Timed(Recording):
    """Passes that take a second and a tenth of one for each row. Runs out of memory as `Recording`, if adapters are by row."""

    def __init__(self, network: torch.nn.Module, *, room_by_row: int = 64) -> None:
        super().__init__(network=network)
        self._room_by_row = room_by_row

    def run(self, batch: Sequence[Member], *, patience: float) -> Prediction:
        self.room = self._room_by_row if len({one.adapter_key for one in batch}) > 1 else 64
        prediction = super().run(batch, patience=patience)
        rows = sum(one.rows for one in batch)
        return replace(prediction, time=ForwardTime(((0, 10**9 + rows * 10**8),)))


class Loop:
    """An engine over a network of its own, to which the duration of a pass is known."""

    def __init__(self, **room: int) -> None:
        self.metrics = Instruments(NODE, model="m", role="Denoiser")
        network = copy.deepcopy(NETWORK)
        self.runner = Timed(network, **room)
        self.engine: Engine = engine_of(self.runner, network=network, max_running=8, metrics=self.metrics)
        self.engine.submit(sample(100, steps=3)[0])
        finish(self.engine)
        self.runner.passes.clear()

    @property
    def merges(self) -> float:
        labels = {"model": "m", "role": "Denoiser", "kind": "merge"}
        return self.metrics.registry.get_sample_value("latentflow_loads_total", labels) or 0.0


@cache
def library() -> Library:
    found = Library(SHAPES / "loras")
    found.scan(settled=False)
    return found


def loaded(adapters: Set) -> tuple[tuple[Layers, float], ...]:
    return tuple((library().get(name).components["unet"], weight) for name, weight in adapters)


def with_set(key: int, adapters: Set, **arguments: Any) -> tuple[Member, Listener]:
    one, listener = sample(key, **({"steps": STEPS} | arguments))
    one.adapters, one.adapter_key = loaded(adapters), adapters
    return one, listener


def alone(key: int, adapters: Set, **arguments: Any) -> torch.Tensor:
    """The latents of a request that shares no pass and has its adapters merged."""
    loop = Loop()
    one, received = with_set(key, adapters, **arguments)
    loop.engine.submit(one)
    finish(loop.engine)
    assert received.latents is not None
    return received.latents


def control() -> dict[str, Any]:
    return {"controls": (Control(source=Edges(), scale=0.8),)}


MIXED: list[tuple[Set, dict[str, Any]]] = [
    ((("neon", 0.8),), {}),
    ((("neon", -0.3),), {"guidance": 1.0, "sampler": "euler"}),
    ((("outline", 0.6), ("pastel", 1.1)), {"guidance": 5.0}),
    ((), {}),
    ((("pastel", 1.0),), {"guidance": 1.0}),
    ((("pastel", 1.0),), {"sampler": "dpmpp_2m"}),
]


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "controlnet"])
def test_requests_with_different_sets_share_every_pass_and_equal_those_alone(steered: bool) -> None:
    loop = Loop()
    received = []
    arguments = [its | (control() if steered and key % 2 == 0 else {}) for key, (_, its) in enumerate(MIXED)]
    for key, (adapters, _) in enumerate(MIXED):
        one, listener = with_set(key, adapters, **arguments[key])
        received.append(listener)
        loop.engine.submit(one)
    finish(loop.engine)
    assert loop.runner.passes == [list(range(len(MIXED)))] * STEPS
    assert loop.merges == 0
    for key, (adapters, _) in enumerate(MIXED):
        latents = received[key].latents
        assert latents is not None
        its = arguments[key] | (control() if "controls" in arguments[key] else {})
        assert (latents - alone(key, adapters, **its)).abs().max() < LATENTS


def test_requests_join_and_leave_passes_with_adapters_by_row() -> None:
    loop = Loop()
    steps = (3, 5, 4)
    received = []
    for key, (adapters, _) in enumerate(MIXED[:3]):
        one, listener = with_set(key, adapters, steps=steps[key])
        received.append(listener)
        loop.engine.submit(one)
        loop.engine.step()
    finish(loop.engine)
    assert loop.runner.passes == [[0], [0, 1], [0, 1, 2], [1, 2], [1, 2], [1, 2]]
    for key, (adapters, _) in enumerate(MIXED[:3]):
        latents = received[key].latents
        assert latents is not None
        assert (latents - alone(key, adapters, steps=steps[key])).abs().max() < LATENTS


def test_a_deterministic_request_among_other_sets_is_bit_identical_to_alone() -> None:
    loop = Loop()
    chosen = with_set(7, MIXED[2][0], deterministic=True)
    for one, _ in (with_set(1, MIXED[0][0]), chosen, with_set(2, MIXED[1][0]), with_set(3, ())):
        loop.engine.submit(one)
    finish(loop.engine)
    assert [7] in loop.runner.passes
    assert all(len(keys) == 1 for keys in loop.runner.passes if 7 in keys)
    assert [1, 2, 3] in loop.runner.passes
    assert chosen[1].latents is not None
    assert torch.equal(chosen[1].latents, alone(7, MIXED[2][0], deterministic=True))


def test_adapters_that_are_late_join_the_passes_of_other_sets() -> None:
    latents = []
    for others in (0, 2):
        loop = Loop()
        one, received = sample(1, steps=STEPS)
        arrives: Future[Any] = Future()
        one.late_adapters = LateAdapters(loaded=arrives, key="neon", steps=3)
        loop.engine.submit(one)
        for key in range(others):
            loop.engine.submit(with_set(10 + key, MIXED[key][0])[0])
        loop.engine.step()
        arrives.set_result(loaded((("neon", 0.8),)))
        finish(loop.engine)
        assert one.steps_without_adapters == 1
        assert received.latents is not None
        latents.append(received.latents)
        assert {len(keys) for keys in loop.runner.passes} == {others + 1}
    assert (latents[0] - latents[1]).abs().max() < LATENTS


class Arriving(Edges):
    """A ControlNet that lets late adapters arrive while a step is requested."""

    def __init__(self, arrives: Future[Any]) -> None:
        super().__init__()
        self._arrives = arrives

    def request(self, **arguments: Any) -> Future[Residuals]:
        if not self._arrives.done():
            self._arrives.set_result(loaded((("neon", 0.8),)))
        return super().request(**arguments)


def test_adapters_that_arrive_before_a_pass_are_in_effect_in_their_first_step() -> None:
    loop = Loop()
    one, received = sample(1, steps=STEPS)
    arrives: Future[Any] = Future()
    one.late_adapters = LateAdapters(loaded=arrives, key=(("neon", 0.8),), steps=0)
    loop.engine.submit(one)
    loop.engine.submit(sample(2, steps=1, controls=(Control(source=Arriving(arrives), scale=1.0),))[0])
    finish(loop.engine)
    assert received.latents is not None
    assert (received.latents - alone(1, (("neon", 0.8),))).abs().max() < LATENTS


def test_a_device_without_memory_for_all_rows_gets_smaller_passes() -> None:
    loop = Loop(room_by_row=3)
    received = []
    for key, (adapters, arguments) in enumerate(MIXED):
        one, listener = with_set(key, adapters, **arguments)
        received.append(listener)
        loop.engine.submit(one)
    finish(loop.engine)
    assert all(listener.latents is not None for listener in received)
    assert max(len(keys) for keys in loop.runner.passes) == 3
    # Passes without adapters are as large as before.
    loop.runner.passes.clear()
    for key in range(8):
        loop.engine.submit(sample(key, steps=1)[0])
    finish(loop.engine)
    assert loop.runner.passes == [list(range(8))]


def test_a_rank_that_holds_a_part_of_the_layers_merges_adapters() -> None:
    shard = Shard(plan=Plan(splits=(), counts=()), rank=0, ranks=2)
    merger = ShardMerger(NETWORK, names={}, what="denoiser", shard=shard)
    assert not AppliedAdapters(merger, Loop().metrics).is_by_row_supported


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing a pass is cheap, whatever other processes of the machine do."""
    known = {rows: 1.0 + 0.1 * rows for rows in range(1, 17)}
    monkeypatch.setattr(Profile, "seconds", lambda *_: known)


def mean_batch(stack: Stack, name: str) -> float:
    """Requests in a pass of a denoiser, on average."""
    registry = stack.nodes[name].context.metrics.registry
    labels = {"model": name, "role": "Denoiser"}
    total = registry.get_sample_value("latentflow_batch_size_sum", labels) or 0.0
    return total / stack.passes(name)


async def assert_equal(stack: Stack, openings: Sequence[Any], requests: Sequence[Request]) -> None:
    """Runs calls whose requests have been encoded, at the same time."""
    results = await asyncio.gather(*(result_of(call) for call in openings))
    for request, result in zip(requests, results, strict=True):
        expected, _ = reference(SHAPES, request)
        latents = await stack.peers.fetch(result.latents, name="latents")
        assert (latents - expected).abs().max().item() <= LATENTS


async def result_of(call: Any) -> stage_pb2.DenoiseResult:
    found = stage_pb2.DenoiseResult()
    async for event in call:
        if event.WhichOneof("event") == "result":
            found = event.result
    return found


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.usefixtures("shares")
async def test_concurrent_requests_with_different_sets_share_passes_and_equal_diffusers(
    edge_image: Image.Image, layout_image: Image.Image
) -> None:
    edges, layout = ("edges", edge_image, 0.7), ("layout", layout_image, 1.2)
    requests = [
        Request(seed=1, steps=24, loras=[("neon", 0.8)]),
        Request(seed=2, steps=24, loras=[("outline", 1.0)], guidance_scale=1.0, sampler="euler"),
        Request(seed=3, steps=24, loras=[("pastel", -0.5)], controls=[edges], negative_prompt="a star"),
        Request(seed=4, steps=24, loras=[("neon", 0.3), ("outline", 0.6)], controls=[edges, layout]),
        Request(seed=5, steps=24),
    ]
    own: dict[str, dict[str, object]] = {"base": {"engine": EngineOptions(threads=1, max_running=8)}}
    controls = {"edges": "controlnet-edges", "layout": "controlnet-layout"}
    async with started(MODELS, "shapes", controls=controls, loras="loras", own=own) as stack:
        openings = [await stack.denoise_open(request) for request in requests]
        before = stack.passes("base")
        await assert_equal(stack, [stack.denoising(opening) for opening in openings], requests)
        # No two of them have the same set, so with merged sets each step of each would be a pass.
        assert stack.passes("base") - before <= sum(request.steps for request in requests) / 2


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.usefixtures("shares")
async def test_a_guidance_peer_applies_the_sets_of_several_requests_by_row(edge_image: Image.Image) -> None:
    requests = [
        Request(seed=1, steps=24, loras=[("neon", 0.8)]),
        Request(seed=2, steps=24, loras=[("outline", 1.0), ("pastel", 0.4)]),
        Request(seed=3, steps=24, loras=[("pastel", 0.6)], controls=[("edges", edge_image, 0.8)]),
    ]
    async with started(
        MODELS, "shapes", controls={"edges": "controlnet-edges"}, loras="loras", denoisers=["peer"]
    ) as stack:
        openings = [await stack.denoise_open(request) for request in requests]
        calls = []
        for opening in openings:
            opening.guidance_peer.CopyFrom(stack.peer("peer"))
            calls.append(stack.stage("base").Denoise([stage_pb2.DenoiseRequest(open=opening)], timeout=SECONDS))
        await assert_equal(stack, calls, requests)
        # No two requests have the same set, so passes are shared by row alone.
        assert stack.passes("peer") > 12
        assert mean_batch(stack, "peer") > 1
        assert mean_batch(stack, "base") > 1

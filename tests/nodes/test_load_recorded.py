"""A server's load as its callers see it: WatchLoad over gRPC, and the means behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from latentflow.api.types import Engine
from latentflow.internal.metrics import NODE, Instruments
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2
from latentflow_nodes.engine.load import Load, PassSize
from support.packs import MODELS
from support.stack import SECONDS, Request, Stack, started

on_the_stack = pytest.mark.asyncio(loop_scope="session")


def watching(stack: Stack, name: str) -> Any:
    return control_pb2_grpc.ControlStub(stack.channel(name)).WatchLoad(control_pb2.WatchLoadRequest(), timeout=SECONDS)


async def until(call: Any, holds: Callable[[control_pb2.WatchLoadResponse], bool]) -> control_pb2.WatchLoadResponse:
    """The first message for which a condition holds."""
    while True:
        message: control_pb2.WatchLoadResponse = await call.read()
        if holds(message):
            return message


def made() -> Load:
    return Load(Instruments(NODE, model="m", role="Denoiser"))


@on_the_stack
async def test_load_is_streamed_from_idle_over_busy_to_draining() -> None:
    async with started(MODELS, "shapes", own={"base": {"engine": Engine(threads=1, max_running=1)}}) as stack:
        load = watching(stack, "base")
        first = await load.read()
        assert (first.running, first.queued, first.awake, first.draining, first.epoch) == (0, 0, True, False, 0)
        assert [device.kind for device in first.devices] == ["cpu"]
        long = stage_pb2.DenoiseRequest(open=await stack.denoise_open(Request(steps=1000)))
        calls = [stack.stage("base").Denoise([long], timeout=SECONDS) for _ in range(2)]
        await until(load, lambda message: (message.running, message.queued) == (1, 1))
        for call in calls:
            call.cancel()
        await until(load, lambda message: (message.running, message.queued) == (0, 0))
        await control_pb2_grpc.ControlStub(stack.channel("base")).Drain(control_pb2.DrainRequest(), timeout=SECONDS)
        await until(load, lambda message: message.draining)


@on_the_stack
async def test_passes_are_reported_by_rows_and_size(shapes: Stack, layout_image: Any) -> None:
    await shapes.generate(Request(controls=[("layout", layout_image, 1.0)]))
    await shapes.generate(Request(guidance_scale=1.0, side=128))
    sizes = {
        name: {
            (one.rows, one.height, one.width): one.seconds for one in (await watching(shapes, name).read()).pass_times
        }
        for name in ("base", "text", "pixels", "layout", "styles")
    }
    assert {(2, 8, 8), (1, 16, 16)} <= sizes["base"].keys()
    assert {(1, 8, 8), (1, 16, 16)} <= sizes["pixels"].keys()
    assert (2, 8, 8) in sizes["layout"]
    # Other tests use these servers too.
    assert {(1, 0, 0), (2, 0, 0)} <= sizes["text"].keys()
    assert all(one[1:] == (0, 0) for one in sizes["text"])
    assert sizes["styles"] == {}
    assert all(0 < seconds < 60 for of_server in sizes.values() for seconds in of_server.values())


@on_the_stack
async def test_a_busy_server_sends_at_most_ten_messages_per_second(shapes: Stack) -> None:
    call = shapes.denoising(await shapes.denoise_open(Request(steps=1000)))
    load = watching(shapes, "base")
    await load.read()
    began = time.perf_counter()
    for _ in range(4):
        await load.read()
    assert time.perf_counter() - began > 0.3
    call.cancel()


async def test_changes_in_quick_succession_are_one_message() -> None:
    load = made()
    states = load.watch()
    assert (await anext(states)).running == 0
    for running in range(5):
        load.set(running=running, queued=1)
    second = await anext(states)
    assert (second.running, second.queued) == (4, 1)
    await states.aclose()


async def test_equal_numbers_are_no_change() -> None:
    load = made()
    states = load.watch()
    await anext(states)
    load.set(running=0, queued=0)
    waiting = asyncio.create_task(anext(states))
    await asyncio.wait([waiting], timeout=0.3)
    assert not waiting.done()
    load.set(running=1, queued=0)
    assert (await waiting).running == 1
    await states.aclose()


def test_recent_passes_count_more_in_a_mean() -> None:
    load = made()
    size = PassSize(rows=2, height=8, width=8)
    for seconds in (1.0, 2.0):
        load.passed(size, requests=1, seconds=seconds)
    assert load.state().pass_seconds == {size: pytest.approx(1.1)}


def test_callers_cannot_make_the_number_of_sizes_grow_without_bound() -> None:
    load = made()
    for side in range(1000):
        load.passed(PassSize(rows=1, height=side, width=side), requests=1, seconds=1.0)
    assert len(load.state().pass_seconds) == 64
    assert PassSize(rows=1, height=999, width=999) in load.state().pass_seconds

"""Servers sleep and wake: what they refuse, what becomes of running requests, and that results stay the same."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latentflow.errors import FailedPreconditionError, InvalidRequestError, LatentflowError, UnavailableError
from latentflow.internal import images
from latentflow.internal.status import error_from
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2
from PIL import Image
from support.packs import MODELS, SHAPES
from support.stack import SECONDS, Request, Stack, png, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
SERVERS = ("text", "base", "pixels", "edges", "styles")


class Sleepers:
    """A workflow's servers, whose epochs are counted."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._epoch = 0

    def control(self, name: str) -> control_pb2_grpc.ControlStub:
        return control_pb2_grpc.ControlStub(self.stack.channel(name))

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def sleeping(self, name: str, *, epoch: int | None = None, grace: float = SECONDS) -> Any:
        request = control_pb2.SleepRequest(epoch=self.next_epoch() if epoch is None else epoch)
        request.grace.FromNanoseconds(int(grace * 1e9))
        return self.control(name).Sleep(request, timeout=SECONDS)

    def waking(self, name: str, *, epoch: int | None = None) -> Any:
        request = control_pb2.WakeRequest(epoch=self.next_epoch() if epoch is None else epoch)
        return self.control(name).Wake(request, timeout=SECONDS)

    async def load(self, name: str) -> control_pb2.WatchLoadResponse:
        """The load that the server reports now."""
        call = self.control(name).WatchLoad(control_pb2.WatchLoadRequest(), timeout=SECONDS)
        message: control_pb2.WatchLoadResponse = await call.read()
        call.cancel()
        return message

    async def until_refusing(self, name: str) -> None:
        """Returns when the server reports that it admits no requests."""
        call = self.control(name).WatchLoad(control_pb2.WatchLoadRequest(), timeout=SECONDS)
        while (await call.read()).awake:
            pass
        call.cancel()

    def sample(self, name: str, metric: str, **labels: str) -> float | None:
        node = self.stack.nodes[name]
        constant = {"model": name, "role": node.context.settings.role}
        return node.context.metrics.registry.get_sample_value(metric, constant | labels)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sleepers() -> AsyncIterator[Sleepers]:
    """Servers of every role. Each test leaves them awake."""
    async with started(MODELS, "shapes", controls={"edges": "controlnet-edges"}, loras="loras") as stack:
        yield Sleepers(stack)


async def events(call: Any) -> list[Any]:
    """What a call sends, up to its end."""
    if not hasattr(call, "read"):
        return [await call]
    found = []
    while (event := await call.read()) is not grpc.aio.EOF:
        found.append(event)
    return found


async def refused(call: Any) -> LatentflowError:
    with pytest.raises(grpc.RpcError) as caught:
        await events(call)
    return error_from(caught.value)


async def health(stack: Stack, name: str, service: str) -> Any:
    stub = health_pb2_grpc.HealthStub(stack.channel(name))
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)).status


async def test_results_are_the_same_bits_after_servers_of_every_role_have_slept(
    sleepers: Sleepers, edge_image: Image.Image
) -> None:
    stack = sleepers.stack
    requests = [Request(loras=[("neon", 0.8)], controls=[("edges", edge_image, 1.0)]), Request(seed=8)]
    # In this order LoRAs are merged before the servers fall asleep, and then others are applied by row.
    before = [await stack.generate(one) for one in reversed(requests)][::-1]
    await asyncio.gather(*(stack.denoise(Request(steps=8, loras=[(one, 1.0)])) for one in ("outline", "pastel")))
    for name in SERVERS:
        await sleepers.sleeping(name)
    for name in SERVERS:
        await sleepers.waking(name)
    for request, (latents, image) in zip(requests, before, strict=True):
        again, pixels = await stack.generate(request)
        assert torch.equal(again, latents)
        assert pixels.tobytes() == image.tobytes()


@pytest.mark.parametrize("name", SERVERS)
async def test_a_sleeping_server_is_up_refuses_requests_and_reports_its_sleep(sleepers: Sleepers, name: str) -> None:
    stack, epoch = sleepers.stack, sleepers.next_epoch()
    description = await stack.describe(name)
    slept = await sleepers.sleeping(name, epoch=epoch)
    load = await sleepers.load(name)
    assert (load.awake, load.epoch, sleepers.sample(name, "latentflow_awake")) == (False, epoch, 0)
    states = [await health(stack, name, service) for service in ("", "latentflow.v1.Stage")]
    assert states == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    stage = stack.stage(name)
    calls = {
        "text": lambda: stage.Encode(stage_pb2.EncodeRequest(), timeout=SECONDS),
        "base": lambda: stage.Denoise([stage_pb2.DenoiseRequest()], timeout=SECONDS),
        "pixels": lambda: stage.Decode(stage_pb2.DecodeRequest(), timeout=SECONDS),
        "edges": lambda: stage.Residuals([stage_pb2.ResidualsRequest()], timeout=SECONDS),
        "styles": lambda: stage.Adapter(stage_pb2.AdapterRequest(name="neon", component="unet"), timeout=SECONDS),
    }
    error = await refused(calls[name]())
    assert (type(error), error.reason) == (UnavailableError, Reason.ASLEEP)
    asleep = await stack.describe(name)
    assert asleep.content_digest == description.content_digest
    assert asleep.WhichOneof("details") == description.WhichOneof("details")
    woken = await sleepers.waking(name)
    assert (await sleepers.load(name)).awake
    assert await health(stack, name, "latentflow.v1.Stage") == health_pb2.HealthCheckResponse.SERVING
    assert slept.duration.ToNanoseconds() > 0
    assert woken.duration.ToNanoseconds() > 0
    assert slept.devices[0].used_bytes == slept.devices[0].asleep_bytes == woken.devices[0].asleep_bytes > 0
    assert (woken.devices[0].weights_bytes > 0) == (name != "styles")
    assert sleepers.sample(name, "latentflow_asleep_bytes") == slept.devices[0].asleep_bytes
    assert (sleepers.sample(name, "latentflow_loads_total", kind="wake") or 0) >= 1


async def test_a_sleeping_denoiser_still_gives_out_the_tensors_that_it_holds(sleepers: Sleepers) -> None:
    result = await sleepers.stack.denoise(Request(side=256))
    assert result.latents.WhichOneof("content") == "handle"
    await sleepers.sleeping("base")
    latents = await sleepers.stack.peers.fetch(result.latents, name="latents")
    assert latents.shape == (1, 4, 32, 32)
    await sleepers.waking("base")


async def test_a_peer_that_sleeps_is_reported_as_unavailable(sleepers: Sleepers, edge_image: Image.Image) -> None:
    opening = await sleepers.stack.denoise_open(Request(controls=[("edges", edge_image, 1.0)]))
    await sleepers.sleeping("edges")
    error = await refused(sleepers.stack.denoising(opening))
    assert (type(error), error.reason) == (UnavailableError, Reason.PEER_UNAVAILABLE)
    await sleepers.waking("edges")


async def test_a_repeated_decision_returns_its_first_result_and_an_older_one_is_refused(sleepers: Sleepers) -> None:
    older, epoch = sleepers.next_epoch(), sleepers.next_epoch()
    first, second = await asyncio.gather(*(sleepers.sleeping("pixels", epoch=epoch) for _ in range(2)))
    assert first == second == await sleepers.sleeping("pixels", epoch=epoch)
    for call in (sleepers.sleeping("pixels", epoch=older), sleepers.waking("pixels", epoch=older)):
        error = await refused(call)
        assert (type(error), error.reason) == (FailedPreconditionError, Reason.STALE_EPOCH)
        assert f"the epoch {older} is older than that with the epoch {epoch}" in error.message
    error = await refused(sleepers.waking("pixels", epoch=epoch))
    assert error.message == f"The epoch {epoch} belongs to a Sleep; every decision needs a greater one."
    assert isinstance(await refused(sleepers.waking("pixels", epoch=0)), InvalidRequestError)
    assert not (await sleepers.load("pixels")).awake
    woken = await sleepers.waking("pixels", epoch=sleepers.next_epoch())
    assert woken.devices[0].weights_bytes > 0
    # A server that is awake already has nothing to do.
    wakes = sleepers.sample("pixels", "latentflow_loads_total", kind="wake")
    await sleepers.waking("pixels")
    assert sleepers.sample("pixels", "latentflow_loads_total", kind="wake") == wakes


async def _running(sleepers: Sleepers, steps: int) -> tuple[stage_pb2.DenoiseOpen, Any]:
    """A request that has begun."""
    opening = await sleepers.stack.denoise_open(Request(steps=steps, sampler="euler_ancestral"))
    call = sleepers.stack.denoising(opening)
    assert (await call.read()).progress.step >= 1
    return opening, call


async def test_a_sleep_waits_for_running_requests_within_its_grace(sleepers: Sleepers) -> None:
    _, call = await _running(sleepers, steps=60)
    sleeping = asyncio.ensure_future(sleepers.sleeping("base"))
    await sleepers.until_refusing("base")
    assert (await events(call))[-1].WhichOneof("event") == "result"
    await sleeping
    await sleepers.waking("base")


async def test_after_the_grace_a_request_stops_with_a_checkpoint_and_resumes_bit_for_bit(sleepers: Sleepers) -> None:
    opening, call = await _running(sleepers, steps=300)
    slept = await sleepers.sleeping("base", grace=0)
    assert slept.devices[0].asleep_bytes > 0
    while not (event := await call.read()).progress.HasField("checkpoint"):
        pass
    checkpoint = event.progress.checkpoint
    assert (await refused(call)).reason == Reason.ASLEEP
    assert 1 <= checkpoint.step < 300
    await sleepers.waking("base")
    whole = await _latents(sleepers.stack, opening)
    opening.checkpoint = checkpoint.state
    assert torch.equal(await _latents(sleepers.stack, opening), whole)


async def _latents(stack: Stack, opening: stage_pb2.DenoiseOpen) -> torch.Tensor:
    async for event in stack.denoising(opening):
        if event.WhichOneof("event") == "result":
            return await stack.peers.fetch(event.result.latents, name="latents")
    raise AssertionError("no result")


async def test_a_stream_to_a_controlnet_ends_with_the_grace(sleepers: Sleepers) -> None:
    opening = stage_pb2.ResidualsOpen(
        conditioning=(await sleepers.stack.encode(Request())).conditioning,
        half=stage_pb2.GUIDANCE_HALF_BOTH,
        image=images.png(png(Image.new("RGB", (64, 64)))),
        width=64,
        height=64,
    )
    call = sleepers.stack.stage("edges").Residuals(timeout=SECONDS)
    await call.write(stage_pb2.ResidualsRequest(open=opening))
    assert (await call.read()).opened
    await sleepers.sleeping("edges", grace=0)
    assert (await refused(call)).reason == Reason.ASLEEP
    await sleepers.waking("edges")


async def test_a_later_wake_ends_a_sleep_that_waits_and_the_request_continues(sleepers: Sleepers) -> None:
    _, call = await _running(sleepers, steps=1000)
    epoch = sleepers.next_epoch()
    sleeping = asyncio.ensure_future(sleepers.sleeping("base", epoch=epoch))
    await sleepers.until_refusing("base")
    await sleepers.waking("base")
    error = await refused(sleeping)
    assert (type(error), error.reason) == (FailedPreconditionError, Reason.STALE_EPOCH)
    assert (await call.read()).progress.total == 1000
    assert (await sleepers.load("base")).awake
    call.cancel()
    assert (await sleepers.stack.denoise(Request(steps=2))).HasField("latents")


@pytest.mark.parametrize(("name", "folder"), [("base", "unet"), ("edges", "controlnet-edges"), ("pixels", "vae")])
async def test_a_server_whose_files_have_changed_stays_asleep_until_they_are_back(
    tmp_path: Path, name: str, folder: str, edge_image: Image.Image
) -> None:
    shutil.copytree(SHAPES, tmp_path / "pack")
    weights = tmp_path / "pack" / folder / "diffusion_pytorch_model.safetensors"
    request = Request(controls=[("edges", edge_image, 1.0)])
    async with started(tmp_path, "pack", controls={"edges": "controlnet-edges"}) as stack:
        sleepers = Sleepers(stack)
        latents, image = await stack.generate(request)
        await sleepers.sleeping(name)
        epoch = sleepers.next_epoch()
        content = weights.read_bytes()
        weights.write_bytes(content[:-4] + b"\0\0\0\0")
        error = await refused(sleepers.waking(name, epoch=epoch))
        assert (error.reason, str(weights) in error.message) == (Reason.WEIGHTS_MISMATCH, True)
        weights.unlink()
        error = await refused(sleepers.waking(name, epoch=epoch))
        assert (error.reason, str(weights) in error.message) == (Reason.WEIGHTS_UNAVAILABLE, True)
        assert not (await sleepers.load(name)).awake
        weights.write_bytes(content)
        await sleepers.waking(name, epoch=epoch)
        again, pixels = await stack.generate(request)
        assert torch.equal(again, latents)
        assert pixels.tobytes() == image.tobytes()


async def test_a_lora_store_sees_after_its_sleep_what_has_changed_in_its_folder(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "pack")
    loras = tmp_path / "pack/loras"
    async with started(tmp_path, "pack", loras="loras") as stack:
        sleepers = Sleepers(stack)
        await sleepers.sleeping("styles")
        shutil.copytree(loras / "neon", loras / "again")
        shutil.rmtree(loras / "pastel")
        await sleepers.waking("styles")
        listed = [one.name for one in (await stack.describe("styles")).lora_store.adapters]
        assert listed == ["again", "neon", "outline"]
        assert (await stack.denoise(Request(steps=1, loras=[("again", 1.0)]))).HasField("latents")


async def test_a_half_precision_vae_that_computes_in_single_precision_sleeps_too(tmp_path: Path) -> None:
    from support.packs import tiny_sdxl

    tiny_sdxl(tmp_path / "xl")
    async with started(tmp_path, "xl", dtype="float16") as stack:
        sleepers = Sleepers(stack)
        request = Request(steps=2)
        latents, image = await stack.generate(request)
        for name in ("text", "base", "pixels"):
            await sleepers.sleeping(name)
            await sleepers.waking(name)
        again, pixels = await stack.generate(request)
        assert torch.equal(again, latents)
        assert pixels.tobytes() == image.tobytes()

"""What the servers do with the messages of the wire: streams that change, fields that are not served, descriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from latentflow.api.types import Engine
from latentflow.errors import InvalidRequestError, LatentflowError, UnavailableError, UnimplementedError
from latentflow.internal import images, unserved
from latentflow.internal.status import error_from, error_of_peer
from latentflow.reasons import Reason
from latentflow.v1 import (
    control_pb2,
    generation_pb2,
    images_pb2,
    stage_pb2,
    tensors_pb2,
)
from PIL import Image
from support.packs import MODELS
from support.stack import SECONDS, Request, Stack, png, started

pytestmark = pytest.mark.asyncio(loop_scope="session")
STOP = stage_pb2.DenoiseRequest(stop=stage_pb2.DenoiseStop())


def opened(opening: stage_pb2.DenoiseOpen) -> stage_pb2.DenoiseRequest:
    return stage_pb2.DenoiseRequest(open=opening)


async def ending(call: Any) -> Any:
    """The last message of a call."""
    if not hasattr(call, "read"):
        return await call
    last = None
    while (response := await call.read()) is not grpc.aio.EOF:
        last = response
    return last


async def refused(call: Any) -> LatentflowError:
    with pytest.raises(grpc.RpcError) as caught:
        await ending(call)
    return error_from(caught.value)


async def test_a_stopped_request_resumes_elsewhere_bit_for_bit(shapes: Stack) -> None:
    opening = await shapes.denoise_open(Request(sampler="euler_ancestral", steps=60))
    expected = await shapes.peers.fetch((await ending(shapes.denoising(opening))).result.latents, name="latents")
    call = shapes.stage("base").Denoise(timeout=SECONDS)
    await call.write(opened(opening))
    assert (await call.read()).progress.step >= 1
    await call.write(STOP)
    stopped = (await ending(call)).stopped
    assert 1 <= stopped.checkpoint.step < 60
    assert stopped.forward_ns > 0
    assert stopped.wait_ns > 0
    opening.checkpoint = stopped.checkpoint.state
    result = (await ending(shapes.denoising(opening))).result
    assert torch.equal(await shapes.peers.fetch(result.latents, name="latents"), expected)


async def test_a_queued_request_that_is_stopped_ends_at_once_where_it_began() -> None:
    async with started(MODELS, "shapes", own={"base": {"engine": Engine(threads=1, max_running=1)}}) as stack:
        running = stack.stage("base").Denoise(timeout=SECONDS)
        await running.write(opened(await stack.denoise_open(Request(steps=1000))))
        await running.read()
        opening = await stack.denoise_open(Request(steps=6, seed=8))
        requests = [opened(opening), STOP]
        last = await ending(stack.stage("base").Denoise(requests, timeout=SECONDS))
        assert last.WhichOneof("event") == "stopped"
        assert not last.stopped.HasField("checkpoint")
        assert (last.stopped.forward_ns, last.stopped.wait_ns > 0) == (0, True)
        assert (await running.read()).progress.total == 1000
        running.cancel()
        opening.checkpoint_interval = 3
        async for response in stack.denoising(opening):
            if response.progress.HasField("checkpoint"):
                opening.checkpoint = response.progress.checkpoint.state
        blocking = stack.stage("base").Denoise(timeout=SECONDS)
        await blocking.write(opened(await stack.denoise_open(Request(steps=1000))))
        await blocking.read()
        again = await ending(stack.stage("base").Denoise([opened(opening), STOP], timeout=SECONDS))
        assert again.stopped.checkpoint == stage_pb2.Checkpoint(state=opening.checkpoint, step=3)
        blocking.cancel()


@pytest.mark.parametrize(
    ("requests", "error", "message"),
    [
        (lambda opening: [], InvalidRequestError, "first message of a Denoise stream must be `open`"),
        (lambda opening: [STOP], InvalidRequestError, "first message of a Denoise stream must be `open`"),
        (lambda opening: [opened(opening)] * 2, InvalidRequestError, "Only the first message"),
    ],
)
async def test_a_denoise_stream_out_of_order_is_refused(
    shapes: Stack,
    requests: Callable[[stage_pb2.DenoiseOpen], list[stage_pb2.DenoiseRequest]],
    error: type[LatentflowError],
    message: str,
) -> None:
    opening = await shapes.denoise_open(Request(steps=1000))
    found = await refused(shapes.stage("base").Denoise(requests(opening), timeout=SECONDS))
    assert isinstance(found, error)
    assert message in found.message


UNSERVED = [
    ("ControlNetRef.stale", stage_pb2.DenoiseOpen(control_nets=[stage_pb2.ControlNetRef(stale=True)])),
]


@pytest.mark.parametrize(("field", "opening"), UNSERVED)
async def test_a_server_refuses_a_field_that_it_does_not_serve(
    shapes: Stack, field: str, opening: stage_pb2.DenoiseOpen
) -> None:
    error = await refused(shapes.denoising(opening))
    assert isinstance(error, UnimplementedError)
    assert f"does not serve {field};" in error.message


async def test_every_unserved_field_is_one_of_the_wire() -> None:
    files = (control_pb2, generation_pb2, stage_pb2, tensors_pb2)
    fields = {
        f"{message.name}.{field.name}"
        for file in files
        for message in file.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    }
    assert fields >= unserved.FIELDS
    # The others are of the gateway's own messages; its tests send them.
    assert {field for field, _ in UNSERVED} == {
        field for field in unserved.FIELDS if field.split(".")[0] in stage_pb2.DESCRIPTOR.message_types_by_name
    }


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"half": stage_pb2.GUIDANCE_HALF_UNSPECIFIED}, InvalidRequestError, "is not a guidance half"),
        ({"conditioning": {}}, InvalidRequestError, "The conditioning lacks negative_prompt_embeds, prompt_embeds."),
        ({"image": images_pb2.EncodedImage(media_type="image/webp")}, InvalidRequestError, "media type 'image/webp'"),
        (
            {"image": images_pb2.EncodedImage(data=png(Image.new("RGB", (64, 64))), media_type="image/jpeg")},
            InvalidRequestError,
            "cannot be read as JPEG",
        ),
        (
            {"image": images.png(png(Image.new("RGBA", (64, 64))))},
            InvalidRequestError,
            "The control image has the mode RGBA",
        ),
        ({"image": images.png(png(Image.new("RGB", (64, 72))))}, InvalidRequestError, "is 64x72, the request 64x64"),
    ],
)
async def test_an_opening_that_a_controlnet_cannot_serve_is_refused(
    shapes: Stack, fields: dict[str, Any], error: type[LatentflowError], message: str
) -> None:
    opening = stage_pb2.ResidualsOpen(
        conditioning=(await shapes.encode(Request())).conditioning,
        half=stage_pb2.GUIDANCE_HALF_BOTH,
        image=images.png(png(Image.new("RGB", (64, 64)))),
        width=64,
        height=64,
    )
    for name, value in fields.items():
        opening.ClearField(name)
        opening.MergeFrom(stage_pb2.ResidualsOpen(**{name: value}))
    found = await refused(shapes.stage("edges").Residuals([stage_pb2.ResidualsRequest(open=opening)], timeout=SECONDS))
    assert isinstance(found, error)
    assert message in found.message


async def test_a_controlnet_answers_its_opening_message_before_any_step(shapes: Stack) -> None:
    opening = stage_pb2.ResidualsOpen(
        conditioning=(await shapes.encode(Request(guidance_scale=1.0))).conditioning,
        half=stage_pb2.GUIDANCE_HALF_POSITIVE,
        image=images.png(png(Image.new("RGB", (64, 64)))),
        width=64,
        height=64,
    )
    call = shapes.stage("edges").Residuals(timeout=SECONDS)
    await call.write(stage_pb2.ResidualsRequest(open=opening))
    assert await call.read() == stage_pb2.ResidualsResponse(opened=True)
    call.cancel()


async def test_a_refused_opening_is_reported_with_its_reason_and_not_as_a_failed_write(shapes: Stack) -> None:
    damaged = png(Image.effect_noise((64, 64), 50))[:-1000]
    opening = await shapes.denoise_open(Request())
    image = images_pb2.EncodedImage(data=damaged, media_type="image/png")
    opening.control_nets.add(peer=shapes.peer("edges"), image=image, scale=1, end=1)
    for _ in range(20):
        error = await refused(shapes.denoising(opening))
        assert isinstance(error, InvalidRequestError)
        assert "cannot be read as PNG" in error.message


async def test_a_write_into_a_call_that_a_server_has_ended_is_retried() -> None:
    failed = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core"
    )
    error = error_of_peer(failed)
    assert (type(error), error.reason) == (UnavailableError, Reason.STAGE_BROKEN_OFF)


async def test_servers_describe_the_conditioning_that_they_make_and_take(shapes: Stack) -> None:
    encoded = (await shapes.encode(Request())).conditioning
    made = (await shapes.describe("text")).text_encoder
    halves = {tensor.name: list(tensor.shape) for tensor in made.conditioning}
    halves |= {f"negative_{name}": shape for name, shape in halves.items()}
    assert halves == {name: list(tensor.shape) for name, tensor in encoded.items()}
    assert list(made.adapter_components) == ["text_encoder"]
    base = (await shapes.describe("base")).denoiser
    width = halves["prompt_embeds"][-1]
    assert [(one.name, list(one.shape)) for one in base.conditioning] == [("prompt_embeds", [1, 0, width])]
    assert list(base.adapter_components) == ["unet"]
    edges = await shapes.describe("edges")
    assert list(edges.control_net.conditioning) == list(base.conditioning)
    assert [(net.name, net.content_digest) for net in edges.control_net.nets] == [("", edges.content_digest)]
    assert [device.kind for device in edges.devices] == ["cpu"]
